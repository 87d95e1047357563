"""Which checkpoints are kept: the newest ones, the permanent ones, and the best."""

from collections.abc import Collection
from pathlib import Path

from mamba_train.checkpoint import layout
from mamba_train.checkpoint.folders import delete
from mamba_train.checkpoint.storage import complete_steps


def steps_to_delete(
    steps: Collection[int], *, keep_last: int, permanent_interval_steps: int | None, best_step: int | None
) -> list[int]:
    """Steps among the complete checkpoints that nothing protects, oldest first.

    Protected are the `keep_last` newest, multiples of `permanent_interval_steps` (None: no such), and
    `best_step` (None: unknown or not to be kept). Raises ValueError when `keep_last` is below 1: the
    newest complete checkpoint is what the run would resume from.
    """
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last must be 1 or more, got {keep_last}")
    if permanent_interval_steps is not None and permanent_interval_steps < 1:
        raise ValueError(
            f"checkpoint.permanent_interval_steps must be null or 1 or more, got {permanent_interval_steps}"
        )
    oldest_first = sorted(set(steps))
    return [
        step
        for step in oldest_first[:-keep_last]
        if step != best_step and (permanent_interval_steps is None or step % permanent_interval_steps != 0)
    ]


def apply_retention(
    checkpoints_dir: Path, *, keep_last: int, permanent_interval_steps: int | None, best_step: int | None
) -> list[int]:
    """Delete what `steps_to_delete` says and return those steps.

    A damaged checkpoint neither counts as one of the newest nor is it deleted: it is evidence, and is
    replaced when its step is saved again.
    """
    steps = steps_to_delete(
        complete_steps(checkpoints_dir),
        keep_last=keep_last,
        permanent_interval_steps=permanent_interval_steps,
        best_step=best_step,
    )
    for step in steps:
        delete(Path(checkpoints_dir) / layout.step_name(step))
    return steps
