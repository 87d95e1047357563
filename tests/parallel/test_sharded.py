"""FSDP2 as far as one process without a GPU can show it; tests/distributed has several, tests/gpu real graphs."""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel import sharded as sharded_module
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.sharded import ShardedEngine
from mamba_train.parallel.state import load_weights, whole_state
from mamba_train.ranks import join

MODEL = resolve_model_config(
    ModelConfig(name="test", n_layer=2, d_model=16, d_state=4, d_intermediate=24), tokenizer_vocab_size=31
)


def train(engine: NativeEngine) -> list[tuple[float, float]]:
    engine.prepare(MODEL, OptimConfig(lr=1e-2, max_grad_norm=1.0), seed=0)
    return steps(engine)


def steps(engine: NativeEngine) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        tokens = torch.randint(0, 31, (2, 13), generator=generator)
        for batch in engine.micro_batches([tokens]):
            loss = engine.accumulate(batch[:, :-1], batch[:, 1:], None, torch.tensor(24.0)).item()
        found.append((loss, engine.step(1e-2).grad_norm))
    return found


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_run_of_parts_is_that_of_one_device(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, too: norms, SSMs and the root are gathered in fp32, which autocast leaves alone."""
    monkeypatch.setattr(NativeEngine, "casts_once", False)  # autocast alone, which rounds gradients once more
    config = EngineConfig(device=DeviceKind.cpu, precision=precision)
    sharded, plain = ShardedEngine(config, join()), NativeEngine(config, join())
    assert train(sharded) == train(plain)
    for ours, theirs in zip(whole_state(sharded), whole_state(plain), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(parameter.grad is None for parameter in sharded.model.parameters())
    assert sharded._on_parts is not None
    assert all(part.grad is None for group in sharded._on_parts.param_groups for part in group["params"])


# Attributes of FSDP2 that a pass writes, by who has them, and what each is while none is under way.
CLEAN: dict[str, dict[str, Any]] = {
    "communication": {
        "all_gather_state": None,
        "post_forward_order": [],
        "reduce_scatter_states": [],
        "_last_post_reduce_events": {},
        "reduce_scatter_state": None,
    },
    "root": {"iter_forward_root": None, "post_backward_final_callback_queued": False},
    "state": {"_modules_to_run_forward": set(), "_training_state": TrainingState.IDLE},
    "group": {
        "_all_gather_result": None,
        "_post_reduce_event": None,
        "_all_reduce_state": None,
        "_reshard_after_forward_event": None,
        "_partial_reduce_output": None,
        "_post_forward_indices": [],
        "_training_state": TrainingState.IDLE,
    },
    "parameter": {"unsharded_accumulated_grad": None},
}
OF_OTHER_VERSIONS = {"reduce_scatter_states", "_last_post_reduce_events", "reduce_scatter_state"}  # of torch
DIRTY = {
    type(None): "left",
    bool: True,
    list: ["left"],
    dict: {0: "left"},
    set: {0},
    TrainingState: TrainingState.FORWARD,
}


def owners(engine: ShardedEngine) -> Iterator[tuple[str, Any]]:
    """What of FSDP2 remembers a pass, by the names of CLEAN."""
    root = engine.model._get_fsdp_state()  # type: ignore[operator]
    yield from (("communication", root._comm_ctx), ("root", root._state_ctx))
    for state in root._state_ctx.all_states:
        yield from (("state", state), ("group", state._fsdp_param_group))
        yield from (("parameter", parameter) for parameter in state._fsdp_param_group.fsdp_params)


def traces(engine: ShardedEngine) -> list[str]:
    found = [
        f"{kind}.{name}"
        for kind, owner in owners(engine)
        for name, clean in CLEAN[kind].items()
        if hasattr(owner, name) and getattr(owner, name) != clean
    ]
    parameters = [owner for kind, owner in owners(engine) if kind == "parameter"]
    found += ["gathered" for parameter in parameters if parameter.sharded_state.name != "SHARDED"]
    return found + ["gradient" for parameter in parameters if parameter._unsharded_param.grad is not None]


@pytest.mark.parametrize("place", ["forward", "backward", "nowhere"])
def test_of_a_pass_that_was_recorded_in_vain_nothing_is_left(place: str) -> None:
    """Broken off for real, and with all set by hand that only a GPU, or another moment, would leave."""
    config = EngineConfig(device=DeviceKind.cpu)
    engine, plain = ShardedEngine(config, join()), NativeEngine(config, join())
    assert train(engine) == train(plain)

    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    mixer = engine._bare_model.blocks()[0].mixer
    hooks = {
        "forward": lambda *_: fail(),
        "backward": lambda *call: call[2].register_hook(fail) and None,
        "nowhere": lambda *_: None,
    }
    handle = mixer.register_forward_hook(hooks[place])
    tokens = torch.ones(2, 13, dtype=torch.int64)
    [batch] = engine.micro_batches([tokens])
    with nullcontext() if place == "nowhere" else pytest.raises(RuntimeError, match="capturing"):
        engine.accumulate(batch[:, :-1], batch[:, 1:], None, torch.tensor(24.0))
    handle.remove()
    assert place == "nowhere" or "gathered" in traces(engine)
    for kind, owner in owners(engine):
        for name, value in CLEAN[kind].items():
            if hasattr(owner, name):
                setattr(owner, name, copy(DIRTY[type(value)]))
            else:
                assert name in OF_OTHER_VERSIONS
        if kind == "parameter":
            owner._unsharded_param.grad = torch.ones_like(owner._unsharded_param)
    engine._recorded_in_vain()
    assert not traces(engine)
    engine._forget_gradients()  # of the pass that was not broken off
    engine._is_first = True
    assert steps(engine) == steps(plain)


@pytest.mark.parametrize("each", [False, True])
def test_whole_gradients_wait_for_the_last_micro_batch_unless_each_is_summed(each: bool) -> None:
    engine = ShardedEngine(EngineConfig(device=DeviceKind.cpu, reduce_each_micro_batch=each), join())
    engine.prepare(MODEL, OptimConfig(lr=1e-2), seed=0)
    kept = []
    for tokens in engine.micro_batches(2 * [torch.ones(2, 13, dtype=torch.int64)]):
        engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(48.0))
        kept.append("gradient" in traces(engine) or "parameter.unsharded_accumulated_grad" in traces(engine))
    assert kept == [not each, False]


def test_groups_of_ranks_are_neighbours_and_their_number_is_that_of_the_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four groups of two would not show in tests/distributed, where two groups have two ranks each."""
    monkeypatch.setattr(sharded_module, "init_device_mesh", lambda _, shape, mesh_dim_names: (shape, mesh_dim_names))
    assert sharded_module._mesh("cpu", 1, 8) == ((8,), ("shard",))
    assert sharded_module._mesh("cpu", 2, 8) == ((2, 4), ("replica", "shard"))


def test_weights_that_are_put_in_take_the_place_of_what_is_gathered() -> None:
    """The root stays gathered after a pass, which a run that goes back must not compute with."""
    tokens = torch.arange(26).reshape(2, 13)
    engines = [ShardedEngine(EngineConfig(device=DeviceKind.cpu), join()) for _ in range(2)]
    found = []
    for seed, engine in enumerate(engines):
        engine.prepare(MODEL, OptimConfig(lr=1e-2), seed=seed)
        with torch.no_grad():
            found.append(engine.model(tokens[:, :-1], tokens[:, 1:]).item())
    load_weights(engines[0], whole_state(engines[1])[0])
    with torch.no_grad():
        assert engines[0].model(tokens[:, :-1], tokens[:, 1:]).item() == found[1] != found[0]
