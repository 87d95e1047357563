"""The audit of the SSM parameter contract: at the start and after every resume, before the first step.

It trusts no declaration. It looks at what is stored, at which optimiser group each parameter is in,
and at the arguments that the scan operator really receives in a forward pass under this engine;
on a fresh run also at the initial values themselves.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.config import ModelConfig
from mamba_train.model.contract import Role, rule_for
from mamba_train.model.observe import ScanArguments
from mamba_train.parallel.engine import Engine
from mamba_train.parallel.state import whole

# A draw from the right distribution fails the test on dt_bias once in ten million runs.
FALSE_ALARM_PROBABILITY = 1e-7

# Changes a value in bits that bf16 does not have.
PROBE = 1 + 2.0**-12

# The operator argument in which each role of the contract arrives.
ARGUMENT_OF_ROLE = {Role.a_log: "A", Role.skip: "D", Role.dt_bias: "dt_bias"}


class ContractViolation(RuntimeError):
    """A parameter is not treated as the contract says; the message names it."""


@dataclass(frozen=True)
class AuditRow:
    """What the audit saw of one kind of SSM parameter, over all layers."""

    role: Role
    n_parameters: int
    stored: torch.dtype
    received: torch.dtype
    weight_decay: float


def audit(engine: Engine, model_config: ModelConfig, *, fresh: bool) -> list[AuditRow]:
    """Check every parameter of the contract; return what was seen, one row per role that the model has.

    fresh: the parameters have their initial values, so these are checked too.
    Raises ContractViolation naming the first offending parameter; on the ranks that saw nothing wrong OtherRankFailed.
    """
    pieces, together = engine.pieces(), engine.ranks.together
    decay = together(lambda: _check_groups(engine, pieces.model))
    together(lambda: _check_stored(pieces))
    ssm = {name: piece for name, piece in pieces.model.items() if rule_for(name).role in ARGUMENT_OF_ROLE}
    parameters = {name: whole(piece, engine.ranks).cpu() for name, piece in ssm.items()}
    if fresh:
        together(lambda: _check_initial_values(parameters, model_config))
    probed, records = _observe_probed(engine, ssm, parameters)
    received = together(lambda: _check_received(probed, records))
    rows = []
    for role in received:
        names = [name for name in parameters if rule_for(name).role is role]
        rows.append(AuditRow(role, len(names), parameters[names[0]].dtype, received[role], decay[names[0]]))
    return rows


@torch.no_grad()
def _observe_probed(
    engine: Engine, ssm: dict[str, Piece], parameters: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[ScanArguments]]:
    """The scans of a forward pass with values that rounding would change (D starts as 1, which it would not)."""
    before = {name: piece.values.clone() for name, piece in ssm.items()}
    for piece in ssm.values():
        piece.values.mul_(PROBE)
    engine.pieces_changed()
    records = engine.observe_forward(torch.zeros(1, 2, dtype=torch.int64))
    for name, piece in ssm.items():
        piece.values.copy_(before[name])
    engine.pieces_changed()
    return {name: value * PROBE for name, value in parameters.items()}, records


def format_audit(rows: list[AuditRow]) -> str:
    """The table that the log shows."""
    if not rows:
        return "SSM parameter contract: the model has no SSM parameters"
    lines = ["SSM parameter contract   count  stored   in the scan  weight decay"]
    for row in rows:
        stored, received = (str(dtype).removeprefix("torch.") for dtype in (row.stored, row.received))
        lines.append(f"  {row.role:<22} {row.n_parameters:>5}  {stored:<8} {received:<12} {row.weight_decay:g}")
    return "\n".join(lines)


def _check_groups(engine: Engine, parameters: Iterable[str]) -> dict[str, float]:
    """Every parameter is optimised once, with the decay that its rule allows; returns that decay."""
    decay: dict[str, float] = {}
    for weight_decay, names in engine.parameter_groups():
        for name in names:
            if name in decay:
                raise ContractViolation(f"{name} is in two optimiser groups")
            if weight_decay and not rule_for(name).weight_decay:
                raise ContractViolation(f"{name} has weight decay {weight_decay}, the contract says none")
            decay[name] = weight_decay
    for name in parameters:
        if name not in decay:
            raise ContractViolation(f"{name} is in no optimiser group")
    return decay


def _check_stored(pieces: Pieces) -> None:
    for name, piece in pieces.all().items():
        if piece.values.dtype is not torch.float32:
            raise ContractViolation(f"{name} is stored in {piece.values.dtype}, the contract says torch.float32")


def _check_received(parameters: dict[str, Tensor], records: list[ScanArguments]) -> dict[Role, torch.dtype]:
    """The scan of each layer gets the stored values, in fp32 and unrounded."""
    names = {role: [n for n in parameters if rule_for(n).role is role] for role in ARGUMENT_OF_ROLE}
    n_layers = len(names[Role.a_log])
    if len(records) != n_layers:
        raise ContractViolation(f"the forward pass made {len(records)} scans, the model has {n_layers} SSM layers")
    dtypes: dict[Role, torch.dtype] = {}
    for role, argument in ARGUMENT_OF_ROLE.items():
        for name, record in zip(names[role], records, strict=True):
            seen = record[argument]
            if seen.dtype is not torch.float32:
                raise ContractViolation(f"{name} reaches the scan in {seen.dtype}, the contract says torch.float32")
            expected = -torch.exp(parameters[name]) if role is Role.a_log else parameters[name]
            # exp differs in the last bits between devices; rounding to bf16 is a thousand times more.
            if not torch.allclose(seen.cpu(), expected, rtol=1e-5, atol=0):
                raise ContractViolation(f"{name} reaches the scan rounded: not the value that is stored")
            dtypes[role] = seen.dtype
    return dtypes


def _check_initial_values(parameters: dict[str, Tensor], config: ModelConfig) -> None:
    dt_biases, decays = [], []
    for name, value in parameters.items():
        role = rule_for(name).role
        if role is Role.a_log and value.dim() == 1:  # Mamba-2
            decays.append((name, value.double().exp()))
        elif role is Role.a_log:
            expected = torch.arange(1, config.d_state + 1, dtype=torch.float32).log().expand_as(value)
            if not torch.allclose(value, expected, rtol=1e-5, atol=1e-6):
                raise ContractViolation(f"{name} does not start as log(1..{config.d_state}) in each channel")
        elif role is Role.skip and not bool((value == 1).all()):
            raise ContractViolation(f"{name} does not start as 1")
        elif role is Role.dt_bias:
            dt_biases.append((f"softplus({name})", torch.nn.functional.softplus(value.double())))
    _check_range(dt_biases, "[dt_min, dt_max]", config.dt_min, config.dt_max)
    logs = [(name, value.log()) for name, value in dt_biases]
    _check_distribution(logs, "log-uniform", math.log(config.dt_min), math.log(config.dt_max))
    _check_range(
        [(f"exp({n})", v) for n, v in decays], "[A_init_min, A_init_max]", config.A_init_min, config.A_init_max
    )
    _check_distribution([(f"exp({n})", v) for n, v in decays], "uniform", config.A_init_min, config.A_init_max)


def _check_range(named: list[tuple[str, Tensor]], keys: str, low: float, high: float) -> None:
    for name, values in named:
        least, most = float(values.min()), float(values.max())
        if least < low * 0.999 or most > high * 1.001:
            raise ContractViolation(
                f"{name} lies in [{least:.3g}, {most:.3g}], the contract says {keys} = [{low:g}, {high:g}]"
            )


def _check_distribution(named: list[tuple[str, Tensor]], kind: str, low: float, high: float) -> None:
    """Kolmogorov-Smirnov test of uniformity on [low, high], over all layers together so that tiny models suffice.

    When the pool fails, the layer that is farthest from the distribution is named.
    """
    if not named or low == high:
        return

    def distance(values: Tensor) -> float:
        expected = ((values.flatten().sort().values - low) / (high - low)).clamp(0, 1)
        n = len(expected)
        above = torch.arange(1, n + 1, dtype=torch.float64) / n - expected
        below = expected - torch.arange(n, dtype=torch.float64) / n
        return float(torch.maximum(above, below).max())

    def limit(n: int) -> float:
        # Massart's form of the Dvoretzky-Kiefer-Wolfowitz inequality.
        return math.sqrt(math.log(2 / FALSE_ALARM_PROBABILITY) / (2 * n))

    pooled = torch.cat([value.flatten() for _, value in named])
    suspects = [(name, value) for name, value in named if distance(value) > limit(value.numel())]
    if distance(pooled) > limit(pooled.numel()) or suspects:
        name, value = max(suspects or named, key=lambda item: distance(item[1]))
        unit = math.exp if kind == "log-uniform" else float
        raise ContractViolation(
            f"{name} is not {kind} on [{unit(low):g}, {unit(high):g}]: "
            f"distance {distance(value):.3f} in the layer, {distance(pooled):.3f} over all layers, "
            f"at most {limit(pooled.numel()):.3f} expected"
        )
