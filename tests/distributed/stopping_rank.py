"""train.py of which a rank is stopped in a step of its first start: `stopping_rank.py RANK STEP OVERRIDE ...`."""

import os
import runpy
import signal
import sys
from typing import Any

from mamba_train.ranks import launch
from mamba_train.training.trainer import Trainer
from tests.helpers import REPOSITORY

rank, step = int(sys.argv[1]), int(sys.argv[2])
del sys.argv[1:3]
original = Trainer._step


def stopping(trainer: Trainer) -> Any:
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if trainer.state.step + 1 == step and launch().rank == rank and is_first_start:
        print(f"stopped: process {os.getpid()}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(trainer)


Trainer._step = stopping  # type: ignore[method-assign]
runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
