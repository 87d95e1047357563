"""The learning rate as a pure function of the step."""

import math

from mamba_train.config import ScheduleConfig, ScheduleKind


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """The rate of the update that ends step `step` (1-based).

    Linear warm-up over `warmup_steps`, reaching the peak at its last step; then constant, a half
    cosine (arXiv 1608.03983, equation 5) down to `min_lr_ratio * peak` at the last step, or, for
    wsd, constant until the last `decay_fraction` of all steps, which falls linearly.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    floor = schedule.min_lr_ratio * peak
    if schedule.kind is ScheduleKind.cosine:
        progress = _progress(step, schedule.warmup_steps, total_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind is ScheduleKind.wsd:
        decay_start = max(schedule.warmup_steps, total_steps - round(schedule.decay_fraction * total_steps))
        return peak - (peak - floor) * _progress(step, decay_start, total_steps)
    return peak


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from `start` to `end`, within 0 and 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0
