"""Saves of a run on any number of ranks, written while the training goes on.

`Saver.start` returns when every rank has copied what it holds to the host; a thread of each rank writes that copy.
The threads use no collective operation, which could get mixed up with those of the training: each leaves the sizes
and hashes of its files in the store of the process group, and rank 0, when it has seen all of them, writes the manifest
and makes the checkpoint visible. If any rank dies before that, there is no manifest and no checkpoint.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_train.checkpoint.disk import (
    NotEnoughDiskSpace,
    disk_became_full,
    is_disk_full,
    require_free_space,
)
from mamba_train.checkpoint.folders import clean_up, staging
from mamba_train.checkpoint.manifest import FileRecord
from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.checkpoint.storage import Record, finish, record_texts, write_rank_files
from mamba_train.ranks import OtherRankFailed, Ranks

# How long a run that fails waits for its unfinished save: other ranks may be dead.
GIVE_UP_SECONDS = 30.0


class Saver:
    """Writes the checkpoints of one run, one at a time. All ranks call its methods in the same order."""

    def __init__(self, checkpoints_dir: Path, ranks: Ranks, reserve_gib: float) -> None:
        self._directory = checkpoints_dir
        self._ranks = ranks
        self._reserve_gib = reserve_gib
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._key = ""
        self._gave_up = threading.Event()

    def start(
        self, record: Record, pieces: Pieces, rng: Mapping[str, Tensor], then: Callable[[], object] = lambda: None
    ) -> None:
        """Begin a save: wait for the one before it, copy, and leave the rest to a thread.

        then: what rank 0 does when the checkpoint is there. Raises, on all ranks, NotEnoughDiskSpace for this save or
        for the one before it, or whatever that one failed with.
        """
        self.wait()
        n_bytes = sum(_whole_bytes(piece) for piece in pieces.all().values())
        resources = ExitStack()

        def open_folder() -> str:
            clean_up(self._directory)
            require_free_space(self._directory, n_bytes, self._reserve_gib)
            self._directory.mkdir(parents=True, exist_ok=True)
            return str(resources.enter_context(staging(self._directory, record.step)))

        texts = record_texts(record)
        try:
            folder = Path(self._ranks.first(open_folder))
        except OtherRankFailed as error:
            raise self._translated(error) from None
        copies = self._copy(pieces)
        self._key = self._ranks.new_key()

        def write() -> None:
            with resources:
                self._write(folder, record, texts, copies, rng, n_bytes, then)

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last save is complete; raises, on all ranks, what it failed with."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        outcome = self._ranks.await_post(self._outcome_key())
        if outcome.get("disk_full"):
            raise NotEnoughDiskSpace(outcome["error"])
        if "error" in outcome:
            raise RuntimeError(f"a checkpoint could not be written: {outcome['error']}")

    def close(self, failed: bool) -> None:
        """Let an unfinished save end, or, when the run has failed, give it a while."""
        if self._thread is not None:
            self._thread.join(GIVE_UP_SECONDS if failed else None)
            self._gave_up.set()

    def _copy(self, pieces: Pieces) -> Pieces:
        """What this rank saves, in buffers on the host that the next save uses again."""
        on_gpu = False

        def copied(group: str, parts: Mapping[str, Piece]) -> dict[str, Piece]:
            nonlocal on_gpu
            found = {}
            for name, piece in parts.items():
                if not piece.saved_here:
                    continue
                on_gpu |= piece.values.is_cuda
                key = f"{group}/{name}"
                if key not in self._buffers or self._buffers[key].shape != piece.values.shape:
                    self._buffers[key] = torch.empty_like(
                        piece.values, device="cpu", pin_memory=piece.values.is_cuda, requires_grad=False
                    )
                self._buffers[key].copy_(piece.values, non_blocking=True)
                found[name] = replace(piece, values=self._buffers[key])
            return found

        copies = Pieces(copied("model", pieces.model), copied("optimizer", pieces.optimizer))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _write(
        self,
        folder: Path,
        record: Record,
        texts: Mapping[str, str],
        copies: Pieces,
        rng: Mapping[str, Tensor],
        n_bytes: int,
        then: Callable[[], object],
    ) -> None:
        """The thread: the files of this rank, and on rank 0 the end of the save."""
        report: dict[str, Any]
        try:
            files = write_rank_files(folder, self._ranks.rank, copies, rng)
            report = {"files": {name: asdict(of) for name, of in files.items()}}
        except Exception as error:
            report = self._failure(error, n_bytes)
        self._ranks.post(f"{self._key}/{self._ranks.rank}", report)
        if self._ranks.rank != 0:
            return
        reports = [self._report(rank) for rank in range(self._ranks.world_size)]
        outcome = next((report for report in reports if "error" in report), None)
        if outcome is None:
            try:
                described = {name: FileRecord(**of) for report in reports for name, of in report["files"].items()}
                finish(folder, self._directory, record, texts, described)
                then()
                outcome = {}
            except Exception as error:
                outcome = self._failure(error, n_bytes)
        self._ranks.post(self._outcome_key(), outcome)

    def _report(self, rank: int) -> dict[str, Any]:
        report = self._ranks.await_post(f"{self._key}/{rank}", give_up=self._gave_up.is_set)
        return {"error": f"rank {rank} did not finish"} if report is None else report

    def _outcome_key(self) -> str:
        return f"{self._key}/outcome"

    def _failure(self, error: Exception, n_bytes: int) -> dict[str, Any]:
        if is_disk_full(error):
            error = disk_became_full(self._directory, n_bytes, self._reserve_gib)
        return {"error": str(error) or type(error).__name__, "disk_full": isinstance(error, NotEnoughDiskSpace)}

    def _translated(self, error: OtherRankFailed) -> Exception:
        if error.kind == NotEnoughDiskSpace.__name__:
            return NotEnoughDiskSpace(f"no space for a checkpoint in {self._directory}: rank 0 says how much is needed")
        return error


def _whole_bytes(piece: Piece) -> int:
    return torch.Size(piece.shape).numel() * piece.values.element_size()
