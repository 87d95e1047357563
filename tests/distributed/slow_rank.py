"""train.py of which one rank is slow: `slow_rank.py WHERE RANK SECONDS OVERRIDE ...` under torchrun."""

import runpy
import sys
import time
from typing import Any

from mamba_train.data.loader import BatchLoader
from mamba_train.model.language_model import MambaLM
from mamba_train.ranks import launch
from mamba_train.training import build
from mamba_train.training.trainer import Trainer
from tests.helpers import REPOSITORY

where, rank, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
del sys.argv[1:4]
places: dict[str, tuple[Any, str]] = {
    "forward": (MambaLM, "forward"), "data": (BatchLoader, "_next"), "step": (Trainer, "_step"),
    "start": (build, "audit"),
}  # fmt: skip
owner, name = places[where]
original = getattr(owner, name)


def slow(*args: Any, **kwargs: Any) -> Any:
    time.sleep(seconds)
    return original(*args, **kwargs)


if launch().rank == rank:
    setattr(owner, name, slow)
runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
