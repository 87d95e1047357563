"""train.py, held up in a phase that the test names until the test has sent its signals.

    python phases.py PHASE READY_FILE [OVERRIDE ...]

Where a phase is held in C (as in a compiler or a collective), Python runs no signal handler of its own.
"""

import ctypes
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_train import composition
from mamba_train.training.preemption import StopRequest
from train import run

HELD_IN_C_SECONDS = 60


def held_in_c() -> None:
    READY.touch()
    ctypes.CDLL(None).sleep(HELD_IN_C_SECONDS)


def held_until_asked() -> None:
    READY.touch()
    end = time.monotonic() + 30
    while stop.reason is None and time.monotonic() < end:
        time.sleep(0.01)


def before(owner: Any, name: str, number: int, hold: Callable[[], None]) -> None:
    """Hold before the `number`-th call of a function."""
    function, calls = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            hold()
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__":  # not in the data workers, which import this file again
    PHASE, READY = sys.argv[1], Path(sys.argv[2])
    stop = StopRequest()
    stop.listen()

    # Only now: torch is imported while we are listening.
    from mamba_train.checkpoint import saving
    from mamba_train.parallel.native import NativeEngine
    from mamba_train.training import build
    from mamba_train.training.hooks import validation

    match PHASE:
        case "data_preparation":
            before(build, "open_data", 1, held_in_c)
        case "compilation":
            before(NativeEngine, "backward", 1, held_in_c)
        case "between_micro_batches":  # two of them in a step: the second of step 7
            before(NativeEngine, "backward", 14, held_until_asked)
        case "validation":  # four batches at step 10: the second
            before(validation, "summed_loss", 2, held_until_asked)
        case "last_validation":
            before(validation, "summed_loss", 6, held_until_asked)
        case "save":  # the thread that writes the checkpoint of step 5, while the training goes on
            before(saving, "write_rank_files", 1, held_until_asked)
        case _:
            raise ValueError(PHASE)

    sys.argv = ["train.py", *sys.argv[3:]]
    composition.main(functools.partial(run, stop=stop))
