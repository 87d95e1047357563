"""train.py with a real wandb that fails in a way the test names: `python tracking.py FAILURE [OVERRIDE ...]`."""

import functools
import os
import signal
import sys
from typing import Any

from mamba_train import composition
from mamba_train.monitor import wandb_sink
from mamba_train.training.preemption import StopRequest
from train import run

FAILURE = sys.argv[1]
AT_RECORD = 5
AT_ONE_OF_THE_LAST_RECORDS = 195  # wandb itself waits for its service for half a minute, and then says so

init = wandb_sink._init


def init_impatiently(start: dict[str, Any], mode: Any) -> Any:
    """Nobody answers when it is online; offline, a busy machine may take its time."""
    patient = wandb_sink.INIT_TIMEOUT_SECONDS
    wandb_sink.INIT_TIMEOUT_SECONDS = 3.0 if mode == "online" else patient
    try:
        return init(start, mode)
    finally:
        wandb_sink.INIT_TIMEOUT_SECONDS = patient


def signal_service(number: int) -> None:
    from wandb.sdk import wandb_setup

    connection: Any = wandb_setup.singleton()._connection
    os.kill(connection._proc._process.pid, number)


def at_record(number: int, act: Any) -> None:
    log, calls = wandb_sink._log, 0

    def wrapper(run: Any, record: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            try:
                act()
            except BaseException:  # else the sink would take it for a failure of wandb
                os._exit(99)
        log(run, record)

    wandb_sink._log = wrapper


wandb_sink._init = init_impatiently
match FAILURE:
    case "crash":
        at_record(AT_RECORD, lambda: signal_service(signal.SIGKILL))
    case "hang":  # longer than anybody waits for it
        wandb_sink.FINISH_TIMEOUT_SECONDS = 6.0
        at_record(AT_ONE_OF_THE_LAST_RECORDS, lambda: signal_service(signal.SIGSTOP))

sys.argv = ["train.py", *sys.argv[2:]]
composition.main(functools.partial(run, stop=StopRequest()))
