"""Progress of a run on the terminal: a live bar, or plain lines where there is no terminal."""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mamba_train.config import ProgressMode


class Progress:
    """Shows one step's metrics after another; a context manager, because the live bar must be closed.

    In a terminal a bar moves at every step. Elsewhere (or with mode plain) a line is printed every
    `interval_steps` steps, at each validation, at skipped steps, and at the first and last step. Mode
    silent shows no progress. Messages are shown in every mode.
    """

    def __init__(
        self, mode: ProgressMode, total_steps: int, interval_steps: int, console: Console | None = None
    ) -> None:
        # soft_wrap in `message` keeps long lines whole in a file; the bar itself fits the terminal.
        self._console = console or Console(highlight=False, force_terminal=_force_terminal(mode))
        self._console.file = cast(IO[str], _Lasting(self._console.file))
        if mode is ProgressMode.auto:
            mode = ProgressMode.bar if self._console.is_terminal else ProgressMode.plain
        self.mode = mode
        self._total_steps = total_steps
        self._interval_steps = interval_steps
        self._shown_first = False
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.mode is ProgressMode.bar:
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of one step (names as in metrics.jsonl; missing ones show as a dash)."""
        if self._live is not None:
            self._live.update(self._bar(metrics))
            if metrics.get("validation/loss") is not None:
                self._print(f"step {metrics['step']}/{self._total_steps}{_validation_text(metrics)}")
        elif self.mode is ProgressMode.plain and self._is_due(metrics):
            self._print(format_line(metrics, self._total_steps))
            self._shown_first = True

    def message(self, text: str) -> None:
        """Print a line of text, above the bar when there is one."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()  # a log file should show a line when it happens

    def _is_due(self, metrics: Mapping[str, Any]) -> bool:
        step = metrics["step"]
        return (
            not self._shown_first
            or step % self._interval_steps == 0
            or step >= self._total_steps
            or metrics.get("validation/loss") is not None
            or bool(metrics.get("skipped"))
        )

    def _bar(self, metrics: Mapping[str, Any]) -> Group:
        step = metrics["step"]
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        bar = ProgressBar(total=self._total_steps, completed=step)
        top.add_row(f"{step:,}/{self._total_steps:,}", bar, f"eta {format_duration(metrics.get('eta_seconds'))}")
        return Group(top, Text("  ".join(_fields(metrics)), style="bold yellow" if metrics.get("skipped") else ""))


class _Lasting:
    """A file that a run outlives: with no reader any more, or on a full disk, it is given up, and training goes on."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._is_lost = file, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        return self._attempt(lambda: self._file.write(text)) or 0

    def flush(self) -> None:
        self._attempt(self._file.flush)

    def _attempt(self, call: Callable[[], Any]) -> Any:
        if self._is_lost:
            return None
        try:
            return call()
        except OSError as error:
            self._is_lost = True
            with contextlib.suppress(OSError):  # what waits in its buffer must not fail at the end of the process
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            with contextlib.suppress(OSError):
                reason = f"the progress cannot be written any more ({error.strerror}); training goes on without a word"
                print(f"warning: {reason}, metrics.jsonl has its steps", file=sys.stderr, flush=True)
            return None


def format_line(metrics: Mapping[str, Any], total_steps: int) -> str:
    """One aligned line: step, loss, bits per byte, grad norm, lr, tokens/s, MFU, memory, ETA."""
    width = len(str(total_steps))
    fields = [f"step {metrics['step']:>{width}}/{total_steps}", *_fields(metrics)]
    fields.append(f"eta {format_duration(metrics.get('eta_seconds'))}")
    skipped = "  SKIPPED" if metrics.get("skipped") else ""
    return "  ".join(fields) + _validation_text(metrics) + skipped


def format_duration(seconds: float | None) -> str:
    """Seconds as m:ss, h:mm:ss or, from two days on, days and hours; a dash for None."""
    if seconds is None:
        return "-"
    total = round(seconds)
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _fields(metrics: Mapping[str, Any]) -> list[str]:
    def show(name: str, form: str, scale: float = 1.0) -> str:
        value = metrics.get(name)
        width = len(format(0.0, form))
        return "-".rjust(width) if value is None else format(value * scale, form)

    return [
        f"loss {show('loss', '6.3f')}",
        f"bpb {show('bits_per_byte', '5.3f')}",
        f"grad {show('grad_norm', '5.2f')}",
        f"lr {show('lr', '7.1e')}",
        f"{show('tokens_per_second', '7,.0f')} tok/s",
        f"mfu {show('mfu', '3.0f', 100.0)}%",
        f"mem {show('memory_gib', '4.1f')} GiB",
    ]


def _validation_text(metrics: Mapping[str, Any]) -> str:
    if metrics.get("validation/loss") is None:
        return ""
    bits, accuracy = metrics.get("validation/bits_per_byte"), metrics.get("task/accuracy")
    text = f"  validation loss {metrics['validation/loss']:.3f}" + ("" if bits is None else f" bpb {bits:.3f}")
    return text + ("" if accuracy is None else f" accuracy {accuracy:.1%}")


def _force_terminal(mode: ProgressMode) -> bool | None:
    # A bar that was asked for by name is drawn wherever the output goes.
    return True if mode is ProgressMode.bar else None
