"""What the audit says, in the ranks of an engine, of weights, casts and groups that break the contracts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mamba_train.config import Config
from mamba_train.model import selective_ssm
from mamba_train.model.contract import decay_split
from mamba_train.model.observe import observe_scans
from mamba_train.parallel import optimizer, sharded
from mamba_train.parallel.engine import Engine
from mamba_train.ranks import OtherRankFailed, Ranks
from mamba_train.training.audit import ContractViolation, audit
from tests.distributed.engine_in_rank import MODEL, backward, make, replaced


def verdict(engine: Engine, *, fresh: bool) -> str:
    """What the audit says; on every rank it must stop."""
    said = ""
    try:
        audit(engine, MODEL, fresh=fresh)
    except ContractViolation as error:
        said = str(error)
    except OtherRankFailed:
        said = "stopped"
    on_some, missing_on_some = engine.ranks.any(bool(said)), engine.ranks.any(not said)
    assert on_some != missing_on_some, "ranks disagree"
    return said


def wrong_initial_values(engine: Engine) -> dict[str, str]:
    """Δ biases that are constant, uniform, or zero."""
    said = {}
    for kind in ("constant", "uniform", "zero"):
        before = {name: p.values.clone() for name, p in engine.pieces().model.items()}
        for name, piece in engine.pieces().model.items():
            if name.endswith("ssm.dt_bias"):
                dt = torch.full(piece.shape, 0.01) if kind == "constant" else torch.linspace(0.001, 0.1, *piece.shape)
                bias = torch.zeros(piece.shape) if kind == "zero" else dt + torch.log(-torch.expm1(-dt))
                piece.values.copy_(piece.of(bias))
        engine.pieces_changed()
        said[kind] = verdict(engine, fresh=True)
        for name, piece in engine.pieces().model.items():
            piece.values.copy_(before[name])
        engine.pieces_changed()
    return said


def rounded(name: str) -> Callable[..., Any]:
    """The forward pass of the SSM with one of its parameters in bf16, as a wrapper that casts would have it."""
    forward = selective_ssm.SelectiveSSM.forward

    def rounded_forward(self: Any, *args: Any) -> Any:
        stored = self._parameters[name]
        del self._parameters[name]
        setattr(self, name, stored.detach().bfloat16())
        try:
            return forward(self, *args)
        finally:
            delattr(self, name)
            self._parameters[name] = stored

    return rounded_forward


def left_gathered(config: Config, group: Ranks) -> float:
    """What the first training forward receives for D, 1, after the audit has probed with other values.

    Where the engine may keep gathered weights after a forward pass, it is told to.
    """
    settings = dataclasses.replace(config.engine, reshard_after_forward=False)
    engine = make(dataclasses.replace(config, engine=settings), group)
    audit(engine, MODEL, fresh=True)
    with observe_scans() as records:
        backward(engine)
    return float(records[0]["D"].max())


def misplaced(names: Any) -> tuple[list[str], list[str]]:
    """One parameter of the contract among those that decay."""
    decayed, undecayed = decay_split(names)
    wrong = next(name for name in undecayed if name.endswith("A_log"))
    return [*decayed, wrong], [name for name in undecayed if name != wrong]


def broken_contracts(mixed: Config, engine: Engine) -> dict[str, Any]:
    """Verdicts on parameters that are cast on their way into the scan, and on a wrong group; engine: of `mixed`."""
    group = engine.ranks
    found: dict[str, Any] = {"rounded": {}}
    for name in ("A_log", "D", "dt_bias"):
        with replaced(selective_ssm.SelectiveSSM, "forward", rounded(name)):
            found["rounded"][name] = verdict(engine, fresh=False)
    only_here = rounded("D") if group.rank == group.world_size - 1 else selective_ssm.SelectiveSSM.forward
    with replaced(selective_ssm.SelectiveSSM, "forward", only_here):
        found["rounded on the last rank"] = verdict(engine, fresh=False)
    if isinstance(engine, sharded.ShardedEngine):
        policy = sharded.MixedPrecisionPolicy

        def bf16(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
            return policy(torch.bfloat16, *args, **kwargs)

        with replaced(sharded, "MixedPrecisionPolicy", bf16):
            found["rounded"]["policy"] = verdict(make(mixed, group), fresh=True)
    with replaced(optimizer, "decay_split", misplaced):
        found["misplaced"] = verdict(make(mixed, group), fresh=True)
    return found
