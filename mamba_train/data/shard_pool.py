"""Processes that make the groups of a job, one group after another each, until none is left.

What they make is on the disk; all that comes back is messages and counts. A worker ends when its parent
does, however that ends, so that a killed command leaves nobody behind who still writes.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from mamba_train.data.encoders import fastokens_call, make_encoder
from mamba_train.data.shard_group import Surroundings, tokenise_group
from mamba_train.data.shard_job import Group, JobSettings
from mamba_train.data.text_files import Fields
from mamba_train.data.tokenizer import TextTokenizer

COUNTS = 3  # per worker: bytes read, documents, tokens
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Work:
    """What all workers are given; travels to them by pickle."""

    folder: Path
    settings: JobSettings
    fields: Fields
    paths: dict[str, Path]
    checksums: dict[str, str]
    tokenizer: bytes
    encoder: str
    groups: list[Group]
    threads: int  # of the encoder in each worker
    policy_options: tuple[str, str] = ("--bad-documents", "--max-bad-share")  # as messages call them


def run_pool(work: Work, n_workers: int, log: Callable[[str], None], show: Callable[[list[int]], None]) -> list[str]:
    """Make all groups of `work`; returns the names of those that another process is making.

    show: called a few times a second with the bytes, documents and tokens so far. Raises ValueError with
    the message of the first worker that fails, after ending the others.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of the tokenizer
    counts = context.Array(ctypes.c_int64, COUNTS * n_workers, lock=False)
    next_group = context.Value(ctypes.c_int64, 0)
    pipes: dict[Any, Any] = {}
    busy: list[str] = []
    try:
        for number in range(n_workers):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(number, work, counts, next_group, send), daemon=True)
            process.start()
            send.close()
            pipes[receive] = process
        while pipes:
            for ready in connection.wait(list(pipes), POLL_SECONDS):
                _receive(ready, pipes, busy, log)
            show([sum(counts[kind::COUNTS]) for kind in range(COUNTS)])
    finally:
        for process in pipes.values():
            process.kill()
        for process in pipes.values():
            process.join()
    return busy


def _receive(pipe: Any, pipes: dict[Any, Any], busy: list[str], log: Callable[[str], None]) -> None:
    try:
        kind, text = pipe.recv()
    except EOFError:
        process = pipes.pop(pipe)
        process.join()
        if process.exitcode:
            raise ValueError(
                f"a worker died (exit code {process.exitcode}; -9 may mean that memory ran out: use fewer --workers); "
                "the same command goes on where it stopped"
            ) from None
        return
    if kind == "error":
        raise ValueError(text)
    if kind == "busy":
        busy.append(text)
    else:
        log(text)


def _work(number: int, work: Work, counts: Any, next_group: Any, pipe: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if work.threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(work.threads)

    def progress(n_bytes: int, n_documents: int, n_tokens: int) -> None:
        for kind, count in enumerate((n_bytes, n_documents, n_tokens)):
            counts[COUNTS * number + kind] += count

    try:
        tokenizer = TextTokenizer(work.tokenizer, "the job's tokenizer")
        fast = fastokens_call(tokenizer) if work.encoder == "fastokens" else None
        around = Surroundings(
            work.folder, work.settings, work.fields, work.paths, work.checksums,
            lambda line: pipe.send(("log", line)), progress, work.policy_options,
        )  # fmt: skip
        while True:
            with next_group.get_lock():
                place = next_group.value
                next_group.value += 1
            if place >= len(work.groups):
                break
            group = work.groups[place]
            began = time.monotonic()
            if not tokenise_group(group, tokenizer, make_encoder(tokenizer, fast), around):
                pipe.send(("busy", group.name))
            else:
                pipe.send(("log", f"{group.name}: {len(group.inputs)} inputs in {time.monotonic() - began:.1f} s"))
    except ValueError as error:
        pipe.send(("error", str(error)))
    except OSError as error:  # such as a full disk, which names no file
        pipe.send(("error", f"{work.folder}: {error}"))
    except BaseException:
        pipe.send(("error", f"unexpected: {traceback.format_exc()}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
