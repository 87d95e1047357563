"""What tests of the watchdog share."""

import time
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from mamba_train.config import AlertsConfig, WatchdogConfig
from mamba_train.ranks import Launch, Ranks
from mamba_train.training.hooks.alerts import Alerts
from mamba_train.training.hooks.watchdog import WatchdogHook

QUICK = ["watchdog.heartbeat_seconds=0.3", "watchdog.step_seconds=4", "alerts.timeout_seconds=5"]


def make_hook(run_dir: Path, config: WatchdogConfig, rank: int = 0, **alerts: Any) -> WatchdogHook:
    """Of one of two ranks; alerts: for AlertsConfig."""
    ranks = Ranks(Launch(rank, 2), HashStore())
    return WatchdogHook(run_dir, config, 60.0, ranks, Alerts(AlertsConfig(**alerts), run_dir, print))


def wait_for(condition: Any, seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found
