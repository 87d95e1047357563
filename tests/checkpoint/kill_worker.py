"""Kills processes that save checkpoints, really, and looks at what they leave: `kill_worker.py SCENARIO FOLDER`.

A process of its own because it forks: torch is imported once, every attempt is a fork of it. Each
scenario prints how many kills it made, and fails if any of them left something wrong.
"""

import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mamba_train.checkpoint import (
    Checkpoint,
    apply_retention,
    layout,
    load,
    newest_complete,
    save,
    verify,
)

_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def _checkpoint(step: int, version: int = 0, numbers: int = 1000) -> Checkpoint:
    value = float(step + 1000 * version)
    return Checkpoint(
        step,
        model={"w": torch.full((numbers,), value)},
        optimizer={"w.exp_avg": torch.full((numbers,), value), "w.step": torch.tensor(value)},
        rng={"torch_cpu": torch.zeros(16, dtype=torch.uint8)},
        state={"value": value},
        config={"value": value},
    )


def _unexpected_log(line: str) -> None:
    raise AssertionError(f"a kill must not leave a damaged checkpoint: {line}")


def _newest(folder: Path) -> Checkpoint:
    path = newest_complete(folder, _unexpected_log)
    assert path is not None, "no checkpoint is left"
    found = load(path)
    value = found.state["value"]
    assert found.config["value"] == value
    for tensors in (found.model, found.optimizer):
        assert all(bool((tensor == value).all()) for tensor in tensors.values()), "files of two checkpoints mixed"
    return found


def _fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    return pid


def _die_at(number: int) -> None:
    """From now on count every call that changes the disk, and be killed at the start of the given one."""
    seen = 0
    fsync = os.fsync

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _WRITES or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]):
            count()

    def counting_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = counting_fsync


def _kill_at_every_call(prepare: Callable[[], None], act: Callable[[], object], check: Callable[[], None]) -> int:
    for number in range(1, 1000):
        prepare()

        def child(number: int = number) -> None:
            _die_at(number)
            act()

        _, status = os.waitpid(_fork(child), 0)
        check()
        if os.WIFEXITED(status):
            return number - 1
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("the save never ended")


def _fresh(folder: Path, *checkpoints: Checkpoint) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for checkpoint in checkpoints:
        save(folder, checkpoint, reserve_gib=0)


def _check_next_save_cleans_up(folder: Path, step: int = 90) -> None:
    save(folder, _checkpoint(step), reserve_gib=0)
    assert _newest(folder).step == step
    names = [path.name for path in folder.iterdir()]
    assert all(layout.parse_step(name) is not None for name in names), f"leftovers: {names}"


def new_step(folder: Path) -> int:
    """Killed at every call of a save of a new step: the old or the new one is the newest."""

    def check() -> None:
        assert _newest(folder).step in (1, 2)
        _check_next_save_cleans_up(folder)

    return _kill_at_every_call(
        lambda: _fresh(folder, _checkpoint(1)),
        lambda: save(folder, _checkpoint(2), reserve_gib=0),
        check,
    )


def same_step(folder: Path) -> int:
    """Killed at every call of a save that replaces a complete step: that step is never missing."""

    def check() -> None:
        found = _newest(folder)
        assert found.step == 2, f"step 2 was lost, the newest is {found.step}"
        assert found.state["value"] in (2.0, 1002.0)
        _check_next_save_cleans_up(folder)

    return _kill_at_every_call(
        lambda: _fresh(folder, _checkpoint(1), _checkpoint(2)),
        lambda: save(folder, _checkpoint(2, version=1), reserve_gib=0),
        check,
    )


def retention(folder: Path) -> int:
    """Killed at every call of a deletion: nothing half-deleted bears the name of a checkpoint."""

    def check() -> None:
        assert all(verify(path) == [] for _, path in layout.step_folders(folder))
        assert _newest(folder).step == 4
        _check_next_save_cleans_up(folder)

    return _kill_at_every_call(
        lambda: _fresh(folder, *(_checkpoint(step) for step in (1, 2, 3, 4))),
        lambda: apply_retention(folder, keep_last=1, permanent_interval_steps=3, best_step=None),
        check,
    )


def random_instants(folder: Path) -> int:
    """Killed at random instants of a run that saves all the time; what a save returned is never lost."""
    kills, seed = 40, int(time.time())
    print(f"seed {seed}", file=sys.stderr)
    draw = random.Random(seed)
    _fresh(folder, _checkpoint(1, numbers=300_000))
    newest = 1
    for _ in range(kills):
        read_end, write_end = os.pipe()

        def child(start: int = newest, write_end: int = write_end) -> None:
            for step in range(start, start + 1000):  # the first one replaces what is there
                save(folder, _checkpoint(step, numbers=300_000), reserve_gib=0)
                os.write(write_end, f"{step}\n".encode())
                apply_retention(folder, keep_last=2, permanent_interval_steps=None, best_step=None)

        pid = _fork(child)
        os.close(write_end)
        if draw.random() < 0.7:  # most of them in the middle of a run, some right at its start
            select.select([read_end], [], [], 5)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        with os.fdopen(read_end) as pipe:
            returned = [int(line) for line in pipe.read().split()]
        found = _newest(folder).step
        last_returned = returned[-1] if returned else newest
        assert found in (last_returned, last_returned + 1), f"{last_returned} was saved, {found} is found"
        newest = found
    _check_next_save_cleans_up(folder, newest + 1)
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(globals()[sys.argv[1]](Path(sys.argv[2])))
