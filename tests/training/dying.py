"""train.py that is killed at a place that the test names, however busy the machine is.

python dying.py step N [OVERRIDE ...]          when step N is done
python dying.py save SECONDS [OVERRIDE ...]    so long after the first save began to be written
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from mamba_train.checkpoint import saving
from mamba_train.training.trainer import Trainer

WHERE, VALUE = sys.argv[1], float(sys.argv[2])
step, write = Trainer._step, saving.write_rank_files


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def step_or_die(trainer: Trainer) -> Any:
    if trainer.state.step == VALUE:
        die()
    return step(trainer)


def write_and_die(*args: Any) -> Any:
    threading.Timer(VALUE, die).start()
    return write(*args)


if __name__ == "__main__":  # not in the data workers, which import this file again
    if WHERE == "step":
        Trainer._step = step_or_die  # type: ignore[method-assign]
    else:
        saving.write_rank_files = write_and_die
    train = Path(__file__).parents[2] / "train.py"
    sys.argv = [str(train), *sys.argv[3:]]
    runpy.run_path(str(train), run_name="__main__")
