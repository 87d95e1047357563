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
from mamba_train.config import Config, OptimConfig, Recompute
from mamba_train.model.observe import observe_scans
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.engine import Engine, Judge, Judgement
from mamba_train.parallel.state import whole, whole_state
from mamba_train.ranks import Ranks
from tests.distributed.audit_checks import broken_contracts, left_gathered, verdict, wrong_initial_values
from tests.distributed.engine_in_rank import MODEL, backward, make, replaced

SMALL = 2.0**-12


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
    found |= broken_contracts(mixed, engine)
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
