"""One rank of a run that streams, without a model: `stream_process.py RANK SPEC` (see test_exact_stream_order.py).

It loads with the classes of the trainer, and after each step all ranks give rank 0 what they would have fed to the
model. Rank 0 records a digest of the global step and saves the state every few steps.
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

from mamba_train.data.position import restore, state_of
from mamba_train.data.stream_loader import StreamLoader
from tests.data.digests import digest
from tests.data.rank_process import SAVE_INTERVAL, STEP_SECONDS, fed, record
from tests.data.streams import make_stream


def main(rank: int, spec: dict[str, Any]) -> None:
    world_size, output = spec["world_size"], Path(spec["output"])
    dist.init_process_group(
        "gloo", init_method=f"file://{spec['rendezvous']}", rank=rank, world_size=world_size,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    source, step, samples = make_stream(spec), 0, 0
    if (output / "state.json").exists():
        state = json.loads((output / "state.json").read_text())
        step, samples = state["step"], state["data"]["samples"]
        restore(source, state["data"], step, allow_changed=False)
    dist.barrier()  # all have read it before rank 0 writes the next
    reads_as = world_size - 1 - rank if spec.get("swap") else rank
    loader = StreamLoader(source, reads_as, world_size, spec["micro_batch_size"], spec["workers"])
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
        time.sleep(STEP_SECONDS)
    loader.close()


def _total(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
