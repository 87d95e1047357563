"""A run of train.py's trainer in which each rank notes what the tests look at: `driver.py [OPTION ...] OVERRIDE ...`.

Notes: a hash of each tensor before the first step, and a hash of the rows that the rank got in each step.
"""

import argparse
import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mamba_train import ranks
from mamba_train.checkpoint import saving
from mamba_train.composition import compose_config
from mamba_train.data.batches import Batch
from mamba_train.parallel.state import whole_state
from mamba_train.training.build import build_trainer
from mamba_train.training.trainer import Trainer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--swap", action="store_true", help="each rank trains on the rows of the next one")
    parser.add_argument("--no-pickle", action="store_true", help="unpickling raises")
    parser.add_argument("--stall-save-of", type=int, metavar="STEP", help="rank 1 stalls in the middle of this save")
    parser.add_argument("--fail-at", type=int, metavar="STEP", help="rank 1 raises after this step")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def watch_rows(trainer: Trainer, swap: bool) -> list[list[str]]:
    """Note a hash of every row that goes into the engine, by step."""
    rows: list[list[str]] = []
    original = trainer.engine.micro_batches

    def watched(batches: list[Batch]) -> Iterator[Batch]:
        rows.append([])
        for batch in original(batches):
            if swap:
                batch = of_next_rank(batch)
            rows[-1] += [digest(row) for row in batch.tokens]
            yield batch

    trainer.engine.micro_batches = watched  # type: ignore[method-assign, assignment]
    return rows


def of_next_rank(batch: Batch) -> Batch:
    def exchanged(tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return parts[(dist.get_rank() + 1) % dist.get_world_size()]

    return Batch(exchanged(batch.tokens), None if batch.seq_idx is None else exchanged(batch.seq_idx))


def forbid_pickle() -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("UNPICKLED")

    class Forbidden(pickle._Unpickler):  # type: ignore[name-defined, misc]
        load = forbidden

    pickle.load = pickle.loads = forbidden  # type: ignore[assignment]
    pickle.Unpickler = pickle._Unpickler = Forbidden  # type: ignore[misc, attr-defined]
    dist.distributed_c10d._unpickler = Forbidden  # type: ignore[attr-defined]
    torch.load = forbidden  # type: ignore[assignment]


def stall_save(step: int, rank: int, run_dir: Path) -> None:
    """Rank 1 stops when its files of that save are written but not reported; `stalled` tells the test."""
    write = saving.write_rank_files

    def stalling(staged: Path, *args: Any) -> Any:
        files = write(staged, *args)
        if rank == 1 and f"{step:08d}" in staged.name:
            (run_dir / "stalled").write_text(staged.name)
            time.sleep(600)
        return files

    saving.write_rank_files = stalling  # type: ignore[assignment]


def main() -> None:
    options = parse()
    if options.no_pickle:
        forbid_pickle()
    config = compose_config(options.overrides)
    trainer = build_trainer(config)
    rank, run_dir = trainer.engine.rank, Path(config.run_dir)
    (run_dir / f"pid_{rank}").write_text(str(os.getpid()))
    model, optimizer = whole_state(trainer.engine)
    found = {"start": {name: digest(tensor) for name, tensor in {**model, **optimizer}.items()}}
    rows = watch_rows(trainer, options.swap)
    if options.stall_save_of:
        stall_save(options.stall_save_of, rank, run_dir)
    if options.fail_at and rank == 1:
        step = trainer.engine.step

        def failing(*arguments: Any) -> Any:
            if trainer.state.step == options.fail_at:
                raise RuntimeError("rank 1 fails on purpose")
            return step(*arguments)

        trainer.engine.step = failing  # type: ignore[method-assign]
    trainer.run()
    (run_dir / f"notes_{rank:02d}.json").write_text(json.dumps({**found, "rows": rows}))
    ranks.leave()


if __name__ == "__main__":
    main()
