"""The places at which something besides the step itself may happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mamba_train.training.trainer import Trainer

# One flat record per step; see docs/configuration.md for the keys.
Metrics = dict[str, float | int | bool | None]


class Hook:
    """One concern beside the training step; every method is optional.

    Hooks run in the order in which the trainer lists them. A hook may add keys to the step's
    metrics for the hooks behind it.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, after a resume has been loaded."""

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        """After each global step, skipped ones included."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of a run that reached its end."""

    def on_stop(self, trainer: Trainer) -> None:
        """Before a run that was asked to stop leaves; on all ranks, after the same step."""

    def close(self, failed: bool) -> None:
        """Always called last, also when another hook or the step raised."""


def write_or_warn(write: Callable[[], object], log: Callable[[str], None]) -> None:
    """Write what a run can do without: a full disk costs this and one warning, not the training."""
    try:
        write()
    except OSError as error:
        log(f"warning: not written: {error}; training goes on")
