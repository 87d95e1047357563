"""One rank of a run without a model: `rank_process.py RANK SPEC`, SPEC being a JSON file (see loader_ranks.py).

SPEC is that of shards (see test_exact_order.py), or that of a stream, which has `data` (see streams.py).

It loads with the classes of the trainer, and after each step all ranks give rank 0 what they would have fed to the
model, so that they stay in step as a reduction of gradients makes them. Rank 0 records a digest of the global step,
and saves the state every few steps.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mamba_train.data.batches import Batch, BatchSource, WindowForm
from mamba_train.data.loader import BatchLoader
from mamba_train.data.opening import open_folders
from mamba_train.data.position import restore, state_of
from mamba_train.data.stream_loader import StreamLoader
from tests.data.digests import digest
from tests.data.streams import make_stream

SAVE_INTERVAL = 5
STEP_SECONDS = 0.01  # a step of training takes time as well, in which it can be killed


def make_source(spec: dict[str, Any]) -> BatchSource:
    """What `build_trainer` makes of a config."""
    data = open_folders({"pile": Path(spec["folder"])}, {}, [(step, weights) for step, weights in spec["stages"]])
    form = WindowForm(spec["length"], with_boundaries=True, mask_loss=True)
    return BatchSource(data.corpora, spec["global_batch_size"], spec["seed"], form, data.stages)


def fed(batches: list[Batch]) -> torch.Tensor:
    """All that a model gets, int64 (rows, 3 * length)."""
    parts = []
    for batch in batches:
        assert batch.seq_idx is not None
        parts.append(torch.cat([batch.inputs, batch.targets, batch.seq_idx[:, :-1]], dim=1))
    return torch.cat(parts)


def main(rank: int, spec: dict[str, Any]) -> None:
    world_size, output = spec["world_size"], Path(spec["output"])
    rendezvous = f"file://{spec['rendezvous']}"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(minutes=2)
    )
    streams, step, samples = "data" in spec, 0, 0
    source = make_stream(spec) if streams else make_source(spec)
    if (output / "state.json").exists():
        state = json.loads((output / "state.json").read_text())
        step, samples = state["step"], state["data"]["samples"]
        restore(source, state["data"], step, allow_changed=False)
    dist.barrier()  # all have read it before rank 0 writes the next
    reads_as = world_size - 1 - rank if spec.get("swap") else rank
    loader = (StreamLoader if streams else BatchLoader)(
        source, reads_as, world_size, spec["micro_batch_size"], spec["workers"]
    )
    loader.begin(samples)
    while step < spec["total_steps"]:
        mine = fed(loader.step(samples))
        everyones = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(everyones, mine)
        step, samples = step + 1, samples + source.global_batch_size
        if step % SAVE_INTERVAL == 0:
            loader.gather(_total)
        if rank == 0:
            record(output, step, world_size, digest(torch.cat(everyones)))
            if step % SAVE_INTERVAL == 0:
                temporary = output / "state.tmp"
                temporary.write_text(json.dumps({"step": step, "data": state_of(source, samples)}))
                temporary.rename(output / "state.json")
        time.sleep(600 if step == spec.get("wait_after") else STEP_SECONDS)
    loader.close()


def _total(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def record(output: Path, step: int, world_size: int, value: str) -> None:
    with (output / "steps.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, "world_size": world_size, "digest": value}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
