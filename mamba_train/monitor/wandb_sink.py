"""Metrics to Weights & Biases, in a way that can never stop or delay training for long.

Three things about wandb shape this module. It drops a record whose `step` is below the run's own
counter, which after a resume from an earlier checkpoint is ahead of ours, so the x axis is our
metric `step` and wandb's counter is only set where it may move forward. An offline run that is
resumed becomes a second folder with the same id, whose counter would start at 0 if we did not set
it. And without a login it would ask on the terminal, so it is only asked to go online when there
are credentials.
"""

import math
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mamba_train.config import LoggingConfig, WandbMode
from mamba_train.monitor.jsonl import Metrics
from mamba_train.monitor.redact import redact_credentials

INIT_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 60.0

_ENVIRONMENT_MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.disabled,
}


class WandbSink:
    """One wandb run, the same one after every resume.

    run_dir: the files go to run_dir/wandb. config: what is shown as the run's config, stored
    without credentials. run_id: from the checkpoint; None lets wandb choose. warn: receives the one
    line that is said if tracking fails; training then goes on without it.
    """

    def __init__(
        self,
        run_dir: Path,
        logging_cfg: LoggingConfig,
        config: Mapping[str, Any],
        run_id: str | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.run_id = run_id
        self.mode = resolve_mode(logging_cfg.wandb)
        self._warn = warn
        self._run: Any = None
        if self.mode is WandbMode.disabled:
            return
        start = {
            "dir": str(run_dir),
            "project": logging_cfg.wandb_project,
            "name": logging_cfg.wandb_name or Path(run_dir).resolve().name,
            "config": redact_credentials(config),
            "id": run_id,
            "resume": "allow",
        }
        try:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            self._run = self._start(start)
            self.run_id = self._run.id
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever a tracker does wrong, training goes on
            self._disable(error)

    def _start(self, start: dict[str, Any]) -> Any:
        if self.mode is WandbMode.online:
            if not _logged_in():
                self._warn("wandb: not logged in, recording offline; run `wandb login` to track online")
                self.mode = WandbMode.offline
            else:
                try:
                    return _init(start, "online")
                except Exception as error:
                    self._warn(f"wandb: cannot start online ({_one_line(error)}), recording offline")
                    self.mode = WandbMode.offline
                    _forget_failed_start()
        return _init(start, "offline")

    def log(self, metrics: Metrics) -> None:
        """Record one step; entries that are None are left out, booleans become 0 or 1."""
        if self._run is None:
            return
        record = {key: int(value) if isinstance(value, bool) else value for key, value in metrics.items()}
        record = {key: value for key, value in record.items() if value is not None}
        step = record.get("step")
        try:
            counter = int(step) if step is not None and math.isfinite(step) and step >= self._run.step else None
            # Without commit a record given with `step` stays open, and the next one may overwrite it.
            self._run.log(record, step=counter, commit=True)
        except Exception as error:
            self._disable(error)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run; a non-zero exit code marks it as failed."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self._run = None
        self.mode = WandbMode.disabled
        self._warn(f"wandb: {_one_line(error)}; tracking is off for the rest of this run, training goes on")


def resolve_mode(mode: WandbMode) -> WandbMode:
    """Turn `auto` into what it means here: WANDB_MODE if set, else online when logged in, else offline."""
    if mode is not WandbMode.auto:
        return mode
    from_environment = _ENVIRONMENT_MODES.get(os.environ.get("WANDB_MODE", "").lower())
    if from_environment is not None:
        return from_environment
    return WandbMode.online if _logged_in() else WandbMode.offline


def _init(start: dict[str, Any], mode: Literal["online", "offline"]) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
    )
    return wandb.init(mode=mode, settings=settings, **start)


def _forget_failed_start() -> None:
    import wandb

    # wandb's service still holds the id of a run that failed to start, and would refuse it offline.
    wandb.teardown()


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        import wandb

        base_url = wandb.setup().settings.base_url
        file = netrc.netrc(os.environ.get("NETRC"))
    except Exception:  # no netrc, an unreadable one, or a broken wandb: not logged in
        return False
    # Keys stored before wandb changed its default host are filed under the old one.
    return any(file.authenticators(host) for host in (urlsplit(base_url).netloc, "api.wandb.ai"))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
