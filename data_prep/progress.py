"""A bar in a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class Bar:
    """Shows how far `total` units are; a context manager."""

    def __init__(self, what: str, total: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._what, self._total = what, total
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=total or None, rate="")
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, done: int, rate: str = "") -> None:
        """Show that `done` units are done; `rate` says how fast, in words."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, rate=rate)
            return
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS:
            self._said = now
            share = f"{done / self._total:.1%}" if self._total else f"{done:,}"
            self.message(f"{self._what}: {share} {rate}".rstrip())

    @property
    def seconds(self) -> float:
        """Since the bar was made."""
        return time.monotonic() - self._began
