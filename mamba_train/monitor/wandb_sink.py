"""Metrics to Weights & Biases, in a way that can neither stop nor delay training.

wandb works in a thread of its own, which takes the records from a queue: whatever hangs or raises there, the training
thread only ever puts a record into the queue. What went wrong is said in one line, and the training goes on; the
records themselves are in metrics.jsonl in any case.

Three more things about wandb shape this module. It drops a record whose `step` is below the run's own
counter, which after a resume from an earlier checkpoint is ahead of ours, so the x axis is our
metric `step` and wandb's counter is only set where it may move forward. An offline run that is
resumed becomes a second folder with the same id, whose counter would start at 0 if we did not set
it. And without a login it would ask on the terminal, so it is only asked to go online when there
are credentials.
"""

import contextlib
import math
import netrc
import os
import queue
import secrets
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mamba_train.config import LoggingConfig, WandbMode
from mamba_train.monitor.jsonl import Metrics, read_metrics
from mamba_train.monitor.redact import redact_credentials

INIT_TIMEOUT_SECONDS = 20.0
FINISH_TIMEOUT_SECONDS = 20.0  # must fit into the time between a warning and the end of a preempted job
UPLOAD_TIMEOUT_SECONDS = 3600.0
STALL_SECONDS = 30.0  # after so long without an answer it is said that wandb hangs
FULL_DISK_BYTES = 2**16  # wandb writes blocks of 32 KiB
QUEUED_RECORDS = 100_000  # that wait at most; about as many steps, and less than 100 MB

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
    without credentials. run_id: from the checkpoint; without one it is drawn here. warn: receives the one
    line that is said if tracking fails, also from another thread; training then goes on without it.
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
        self.mode = _from_environment(logging_cfg.wandb)
        self._warn = warn
        self._run_dir = Path(run_dir)
        self._warned = False
        if self.mode is WandbMode.disabled:
            return
        self.run_id = run_id or secrets.token_hex(4)
        start = _start_arguments(self._run_dir, logging_cfg, config, self.run_id)
        self._queue: queue.Queue[dict[str, Any] | tuple[str, str] | int] = queue.Queue(QUEUED_RECORDS)
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, args=(start,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: Metrics) -> None:
        """Hand over the record of one step; entries that are None are left out, booleans become 0 or 1."""
        if self.mode is WandbMode.disabled:
            return
        with contextlib.suppress(queue.Full):  # wandb hangs, which is said below
            self._queue.put_nowait(_entries(metrics))
        since = self._busy_since
        if since is not None and time.monotonic() - since > STALL_SECONDS:
            self._warn_once(f"it has not answered for {STALL_SECONDS:g} s; training does not wait for it")

    def alert(self, title: str, text: str) -> None:
        """Hand over an event; wandb shows it with the run, and sends it to those who asked for that."""
        if self.mode is not WandbMode.disabled:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((title, text))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, which may take FINISH_TIMEOUT_SECONDS; a non-zero exit code marks it as failed."""
        if self.mode is WandbMode.disabled:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(exit_code)
        self._thread.join(FINISH_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            self.mode = WandbMode.disabled
            self._warn_once(f"it has not finished after {FINISH_TIMEOUT_SECONDS:g} s and is left behind")
            _abandon_service()

    @property
    def upload_command(self) -> str | None:
        """What uploads a run that was recorded offline; None if there is nothing to upload."""
        recorded_offline = list((self._run_dir / "wandb").glob("offline-run-*"))
        return f"mamba-train upload {shlex.quote(str(self._run_dir))}" if recorded_offline else None

    def _work(self, start: dict[str, Any]) -> None:
        """The thread: start the run, log what comes, finish."""
        try:
            with self._busy():
                (self._run_dir / "wandb").mkdir(parents=True, exist_ok=True)
                run = self._start(start)
                _define_axis(run)
            while not isinstance(item := self._queue.get(), int):
                with self._busy():
                    if isinstance(item, tuple):
                        run.alert(title=item[0], text=item[1])
                    else:
                        _log(run, item)
                self._look_at_disk()
            with self._busy():
                run.finish(exit_code=item)
        except Exception as error:  # whatever a tracker does wrong, training goes on
            self.mode = WandbMode.disabled
            self._warn_once(f"{_one_line(error)}; tracking is off for the rest of this run")
            _abandon_service()

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _start(self, start: dict[str, Any]) -> Any:
        self.mode = resolve_mode(self.mode)
        if self.mode is WandbMode.online:
            if not _logged_in():
                self._warn_once("not logged in, recording offline; run `wandb login` to track online")
                self.mode = WandbMode.offline
            else:
                try:
                    return _init(start, "online")
                except Exception as error:
                    self._warn_once(f"cannot start online ({_one_line(error)}), recording offline")
                    self.mode = WandbMode.offline
                    _forget_failed_start()
        return _init(start, "offline")

    def _look_at_disk(self) -> None:
        """wandb itself says nothing when its file cannot be written any more."""
        if shutil.disk_usage(self._run_dir / "wandb").free < FULL_DISK_BYTES:
            self._warn_once(f"the disk is full at {self._run_dir / 'wandb'}, its records are lost")

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"wandb: {text}; training goes on, and every record is in metrics.jsonl")


def resolve_mode(mode: WandbMode) -> WandbMode:
    """Turn `auto` into what it means here: WANDB_MODE if set, else online when logged in, else offline."""
    mode = _from_environment(mode)
    if mode is WandbMode.auto:
        return WandbMode.online if _logged_in() else WandbMode.offline
    return mode


def _from_environment(mode: WandbMode) -> WandbMode:
    """What can be said without importing wandb."""
    if mode is WandbMode.auto:
        return _ENVIRONMENT_MODES.get(os.environ.get("WANDB_MODE", "").lower(), WandbMode.auto)
    return mode


def upload(run_dir: Path, logging_cfg: LoggingConfig, config: Mapping[str, Any], run_id: str) -> tuple[int, str]:
    """Send wandb the steps that it does not have yet; returns how many, and the address of the run there.

    They are taken from metrics.jsonl: in the folders that wandb itself leaves offline the last records of a start
    that was killed are missing, and `wandb sync` stops at a file that breaks off. Raises ValueError when there is no
    login, no record, or no answer; what has arrived by then is not sent again by the next call.
    """
    if not _logged_in():
        raise ValueError("wandb: not logged in; run `wandb login` first")
    records = read_metrics(run_dir)
    try:
        run = _init(_start_arguments(run_dir, logging_cfg, config, run_id), "online", UPLOAD_TIMEOUT_SECONDS)
        _define_axis(run)
        last = run.summary.get("step", 0)
        missing = [record for record in records if record["step"] > last]
        for record in missing:
            _log(run, _entries(record))
        run.finish()
    except Exception as error:  # wandb has many
        _abandon_service()
        raise ValueError(f"wandb: {_one_line(error)}") from error
    return len(missing), run.url


def _start_arguments(
    run_dir: Path, logging_cfg: LoggingConfig, config: Mapping[str, Any], run_id: str
) -> dict[str, Any]:
    return {
        "dir": str(run_dir),
        "project": logging_cfg.wandb_project,
        "name": logging_cfg.wandb_name or run_dir.resolve().name,
        "config": redact_credentials(config),
        "id": run_id,
        "resume": "allow",
    }


def _define_axis(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")


def _entries(metrics: Metrics) -> dict[str, float | int]:
    record = {key: int(value) if isinstance(value, bool) else value for key, value in metrics.items()}
    return {key: value for key, value in record.items() if value is not None}


def _log(run: Any, record: dict[str, Any]) -> None:
    step = record.get("step")
    counter = int(step) if step is not None and math.isfinite(step) and step >= run.step else None
    # Without commit a record given with `step` stays open, and the next one may overwrite it.
    run.log(record, step=counter, commit=True)


def _init(
    start: dict[str, Any], mode: Literal["online", "offline"], finish_timeout: float = FINISH_TIMEOUT_SECONDS
) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=finish_timeout,
    )
    return wandb.init(mode=mode, settings=settings, **start)


def _forget_failed_start() -> None:
    import wandb

    # wandb's service still holds the id of a run that failed to start, and would refuse it offline.
    with contextlib.suppress(Exception):  # a service that died is forgotten, too, before wandb complains of it
        wandb.teardown()


def _abandon_service() -> None:
    """wandb's exit handler would wait for a service that hangs, and complain of one that died: end both."""
    with contextlib.suppress(Exception):  # not wandb's public interface
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton()._connection
        connection._cleanup()
        connection._proc._process.kill()


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
