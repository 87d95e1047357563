"""Checks inside the ranks of one engine: `checks.py OVERRIDE ...` under torchrun; rank 0 prints what was found as JSON.

One process start for all of them, because starting is what takes the time.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mamba_train import ranks
from mamba_train.composition import compose_config
from mamba_train.config import Config, ModelConfig, OptimConfig, Recompute
from mamba_train.model import selective_ssm
from mamba_train.model.contract import decay_split
from mamba_train.model.language_model import resolve_model_config
from mamba_train.model.observe import observe_scans
from mamba_train.parallel import optimizer, sharded
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.engine import Engine, Judge, Judgement
from mamba_train.parallel.state import whole, whole_state
from mamba_train.ranks import OtherRankFailed, Ranks
from mamba_train.training.audit import ContractViolation, audit

# An odd width: what two ranks cut is filled up, and rows of a matrix are cut in the middle.
MODEL = resolve_model_config(
    ModelConfig(name="test", n_layer=2, d_model=33, d_state=4, d_intermediate=24), tokenizer_vocab_size=31
)
SMALL = 2.0**-12
OPTIM = OptimConfig(lr=1e-2, beta1=0.9, max_grad_norm=1e9)
sharded.LEAST_UNITS = 1  # FSDP2 gathers both layers together, as it does a few of many


def make(config: Config, group: Ranks) -> Engine:
    engine = build_engine(config.engine, group)
    engine.prepare(MODEL, OPTIM, seed=0)
    return engine


def backward(engine: Engine, scale: float = 1.0, seed: int = 0, n_micro_batches: int = 1) -> None:
    """The same tokens on all ranks, with a loss that each may scale."""
    for number in engine.micro_batches(range(n_micro_batches)):
        tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(seed + number))
        with engine.compute():
            loss = engine.model(tokens[:, :-1], tokens[:, 1:], None) / 22
        engine.backward(loss * scale)


def zero_moments(engine: Engine) -> None:
    with torch.no_grad():
        for piece in engine.pieces().optimizer.values():
            piece.values.zero_()


def gradient(engine: Engine, scale: float, n_micro_batches: int = 1) -> dict[str, Tensor]:
    """The summed gradient of each weight, read off the first moment, which begins as 0.1 of it."""
    zero_moments(engine)
    backward(engine, scale, n_micro_batches=n_micro_batches)
    engine.step(0.0)
    moments = {n: p for n, p in engine.pieces().optimizer.items() if n.endswith(".exp_avg")}
    return {name.removesuffix(".exp_avg"): whole(piece, engine.ranks).double() for name, piece in moments.items()}


def small_gradients_count(engine: Engine) -> list[str]:
    """Weights for which a gradient g on rank 0 and g·2⁻¹² on rank 1 do not sum to g·(1 + 2⁻¹²)."""
    is_first = engine.rank == 0
    alone = gradient(engine, 1.0 if is_first else 0.0)
    both = gradient(engine, 1.0 if is_first else SMALL if engine.rank == 1 else 0.0)
    lost = []
    for name, value in alone.items():
        assert value.any(), f"{name} has no gradient"
        ratio = float((value * both[name]).sum() / (value * value).sum())
        if not abs((ratio - 1) / SMALL - 1) < 0.01:
            lost.append(name)
    return lost


def recomputed(config: Config, engine: Engine) -> tuple[dict[str, float], dict[str, int]]:
    """Recomputing activations: the largest relative difference of a gradient, and the scans of a step, by policy."""
    expected = gradient(engine, 1.0)
    largest, scans = {}, {}
    for policy in (Recompute.scan, Recompute.layer, Recompute.keep_scan):
        settings = dataclasses.replace(config, engine=dataclasses.replace(config.engine, recompute=policy))
        other = make(settings, engine.ranks)
        with observe_scans() as calls:
            found = gradient(other, 1.0)
        scans[policy.value] = len(calls)
        largest[policy.value] = max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)
    return largest, scans


def scans_with_one_layer_recomputed(config: Config, group: Ranks) -> int:
    """Of a step in which the first layer computes its scan again."""
    settings = dataclasses.replace(config.engine, recompute=Recompute.scan, recompute_layers=1)
    engine = make(dataclasses.replace(config, engine=settings), group)
    with observe_scans() as calls:
        backward(engine)
    return len(calls)


def accumulation(engine: Engine) -> float:
    """Largest relative difference between one step of three micro-batches and the sum of three steps."""
    at_once = gradient(engine, 1.0, n_micro_batches=3)
    sums: dict[str, Tensor] = {}
    for seed in range(3):
        zero_moments(engine)
        backward(engine, seed=seed)
        engine.step(0.0)
        for name, piece in engine.pieces().optimizer.items():
            if name.endswith(".exp_avg"):
                key = name.removesuffix(".exp_avg")
                sums[key] = sums.get(key, 0) + whole(piece, engine.ranks).double()
    return max(float((at_once[n] - sums[n]).norm() / sums[n].norm()) for n in sums)


@contextlib.contextmanager
def counted(prefix: str) -> Iterator[list[str]]:
    """The names of the collectives of torch.distributed that are called and begin like that."""
    calls: list[str] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, original in list(vars(dist).items()):
            if name.startswith(prefix) and callable(original):
                stack.enter_context(replaced(dist, name, counting(name, original)))
        yield calls


def traffic(config: Config, engine: Engine) -> dict[str, list[int]]:
    """Collectives of one step: sums and gathers of kept weights with one and three micro-batches, gathers of others."""
    sums, gathers = [], []
    for n in (1, 3):
        with counted("reduce_scatter") as scattered, counted("all_reduce") as reduced:
            backward(engine, n_micro_batches=n)
        sums.append(len(scattered) + len(reduced))
        engine.step(0.0)
    for reshard, n in ((True, 1), (False, 1), (False, 3)):
        settings = dataclasses.replace(config.engine, reshard_after_forward=reshard)
        other = make(dataclasses.replace(config, engine=settings), engine.ranks)
        with counted("all_gather") as gathered:
            backward(other, n_micro_batches=n)
        gathers.append(len(gathered))
    return {"sums": sums, "gathers": gathers}


def changed_by_keeping(config: Config, group: Ranks) -> list[str]:
    """Weights and moments that are others after steps of several micro-batches in which gathered weights stay."""
    found = []
    for reshard in (True, False):
        settings = dataclasses.replace(config.engine, reshard_after_forward=reshard)
        engine = make(dataclasses.replace(config, engine=settings), group)
        for step in range(3):
            backward(engine, seed=step, n_micro_batches=2)
            engine.step(1e-2)
        found.append(flat(engine))
    return [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


def flat(engine: Engine) -> dict[str, Tensor]:
    model, optimizer = whole_state(engine)
    return {**model, **optimizer}


def skip(engine: Engine) -> dict[str, Any]:
    """A gradient that is not finite on one rank only, and one that a judge refuses.

    All ranks skip, nothing changes, and the next step is the usual one: what it makes of the weights, another engine
    that was never disturbed is compared with.
    """
    backward(engine, seed=1)
    engine.step(1e-2)
    before = flat(engine)
    last = engine.rank == engine.world_size - 1
    skipped, changed = [], set()
    for scale, judge in ((math.nan, None), (math.inf, None), (1.0, refuse(engine)), (math.nan, None)):
        backward(engine, scale if last or math.isfinite(scale) else 1.0)
        result = engine.step(1e-2, judge)
        skipped.append(result.skipped and len(result.layer_grad_norms) > 1)
        after = flat(engine)
        changed |= {name for name, value in before.items() if not torch.equal(value, after[name])}
    # Logits show what the forward pass computes with, which need not be what is stored.
    backward(engine, seed=2)
    result = engine.step(1e-2)
    return {
        "skipped": all(skipped),
        "changed": sorted(changed),
        "next_is_finite": math.isfinite(result.grad_norm) and not result.skipped,
        "moved": not torch.equal(before["embedding.weight"], flat(engine)["embedding.weight"]),
        "after": digests(flat(engine)),
    }


def refuse(engine: Engine) -> Judge:
    """A judge that finds every gradient unusual."""

    def judge(square: Tensor) -> Judgement:
        return Judgement(math.sqrt(engine.sum_over_ranks(square).item()), skip=True)

    return judge


def undisturbed(engine: Engine) -> dict[str, str]:
    """The state after the steps of `skip` that were applied."""
    for seed in (1, 2):
        backward(engine, seed=seed)
        engine.step(1e-2)
    return digests(flat(engine))


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def share(engine: Engine) -> float:
    """What of the moments this rank holds, and under engines that cut the weights too, of the weights."""
    shapes = engine.parameter_shapes()
    total = sum(math.prod(shape) for shape in shapes.values())
    moments = sum(p.values.numel() for n, p in engine.pieces().optimizer.items() if n.endswith(".exp_avg"))
    # Memory behind the pieces of the weights, which may not be a view of something larger than them.
    storages = [p.values.untyped_storage() for p in engine.pieces().model.values() if p.values.numel()]
    weights = {storage.data_ptr(): storage.nbytes() // 4 for storage in storages}
    return max(moments, sum(weights.values())) / total


def layer_norms(config: Config, group: Ranks) -> dict[str, float]:
    """Of the first step, with the norm of all gradients as `all`."""
    engine = make(dataclasses.replace(config, engine=dataclasses.replace(config.engine, layer_grad_norms=True)), group)
    backward(engine)
    result = engine.step(1e-2)
    return {**result.layer_grad_norms, "all": result.grad_norm}


def clipping(engine: Engine) -> float:
    """Norm of what Adam sees of a large gradient when the limit is 0.5."""
    zero_moments(engine)
    backward(engine, scale=1e4)
    engine.step(0.0)
    moments = [p for n, p in engine.pieces().optimizer.items() if n.endswith(".exp_avg")]
    return math.sqrt(sum(float(whole(p, engine.ranks).double().square().sum()) for p in moments)) / 0.1


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


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


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


def losses_by_weights(engine: Engine) -> list[float]:
    """Of passes before and after the weights are doubled, and after they are halved again, as when a run goes back.

    The engine has trained before: DeepSpeed has learnt then in which order weights are needed, and keeps them longer.
    """
    tokens = torch.arange(24).reshape(2, 12)
    found = []
    for factor in (1.0, 2.0, 0.5):
        for piece in engine.pieces().model.values():
            piece.values.mul_(factor)
        engine.pieces_changed()
        with torch.no_grad(), engine.compute():
            found.append(engine.model(tokens[:, :-1], tokens[:, 1:], None).item())
    return found


def misplaced(names: Any) -> tuple[list[str], list[str]]:
    """One parameter of the contract among those that decay."""
    decayed, undecayed = decay_split(names)
    wrong = next(name for name in undecayed if name.endswith("A_log"))
    return [*decayed, wrong], [name for name in undecayed if name != wrong]


def main() -> None:
    overrides = [*sys.argv[1:], "engine.device=cpu", "training.micro_batch_size=1", "run_dir=unused"]
    group = ranks.join()
    exact = compose_config([*overrides, "engine.precision=fp32"])
    mixed = compose_config([*overrides, "engine.precision=bf16"])
    engine = make(exact, group)
    found: dict[str, Any] = {"start": {n: v.double().sum().item() for n, v in whole_state(engine)[0].items()}}
    found["share"] = share(engine)
    found["clean"] = verdict(engine, fresh=True)
    found["wrong_initial_values"] = wrong_initial_values(engine)
    found["accumulation"] = accumulation(engine)
    found["traffic"] = traffic(exact, engine)
    found["changed by keeping"] = changed_by_keeping(exact, group)
    found["recomputed"], found["scans"] = recomputed(exact, engine)
    found["scans with one layer recomputed"] = scans_with_one_layer_recomputed(exact, group)
    found["skip"] = skip(make(exact, group))
    found["undisturbed"] = undisturbed(engine := make(exact, group))
    found["losses by weights"] = losses_by_weights(engine)
    found["D after the audit"] = left_gathered(exact, group)

    engine = make(mixed, group)
    found["clean in bf16"] = verdict(engine, fresh=True)
    found["lost"] = small_gradients_count(engine)
    found["skip in bf16"] = skip(engine)
    found["rounded"] = {}
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
    clipped = OptimConfig(lr=1e-2, beta1=0.9, max_grad_norm=0.5)
    engine = build_engine(exact.engine, group)
    engine.prepare(MODEL, clipped, seed=0)
    found["clipped_norm"] = clipping(engine)
    found["layer_norms"] = layer_norms(exact, group)
    if group.rank == 0:
        print("FOUND " + json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
