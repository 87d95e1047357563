"""What a run knows about itself besides its weights; all of it goes into the checkpoint."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mamba_train.training.guard import GuardState


@dataclass
class TrainState:
    """Counters of the run. `step` is the number of finished global steps, skipped ones included."""

    step: int = 0
    tokens: int = 0  # trained on so far, those of skipped steps included
    samples: int = 0  # position in the data order
    skipped_steps: list[int] = field(default_factory=list)  # that made no update
    ledger: list[dict[str, Any]] = field(default_factory=list)  # why: see `mamba_train.training.events`
    guard: GuardState = field(default_factory=GuardState)
    best_validation_loss: float | None = None
    best_validation_step: int | None = None
    wandb_run_id: str | None = None
    save_seconds: float | None = None  # what the last save took
    # Of the last step, when a stop came between the step and its record.
    pending_metrics: dict[str, float | int | bool | None] | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """The inverse of `to_json`; raises ValueError for an unknown field, as of a later version."""
        try:
            return cls(**{**values, "guard": GuardState(**values.get("guard", {}))})
        except TypeError as error:
            reason = str(error).partition("() ")[2]
            raise ValueError(
                f"the checkpoint is of another version of the code, resume with that one ({reason})"
            ) from error
