"""Loss against compute over several runs: the line of figure 4 of the Mamba paper, for the runs that exist."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from mamba_train.monitor.run_record import RunRecord

FLOPS_PER_PARAMETER_AND_TOKEN = 6  # forward and backward, as is usual (arXiv 2001.08361, section 2.1)
MIN_RUNS = 3  # two points lie on a line whatever they are
COLOUR = "#0072B2"


@dataclass(frozen=True)
class ScalingPoint:
    """A finished run: FLOPs spent in training, and nats per token on held-out text."""

    name: str
    flops: float
    loss: float


@dataclass(frozen=True)
class PowerLaw:
    """loss = factor * flops ** exponent, by least squares over the logarithms.

    error: standard deviation of log(loss) around the line.
    """

    factor: float
    exponent: float
    error: float

    def __call__(self, flops: float) -> float:
        return float(self.factor * flops**self.exponent)


def scaling_points(runs: Sequence[RunRecord]) -> list[ScalingPoint]:
    """Runs that were validated and say how many parameters they have, by compute."""
    points = []
    for run in runs:
        loss, tokens, parameters = run.last("validation/loss"), run.last("tokens"), run.summary.get("n_parameters")
        if loss is not None and tokens and parameters:
            points.append(ScalingPoint(run.name, FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens, loss))
    return sorted(points, key=lambda point: point.flops)


def fit(points: Sequence[ScalingPoint]) -> PowerLaw | None:
    """The power law through at least three points of different compute, or None."""
    if len({point.flops for point in points}) < MIN_RUNS or any(point.loss <= 0 for point in points):
        return None
    logs = np.log([[point.flops, point.loss] for point in points])
    exponent, offset = np.polyfit(logs[:, 0], logs[:, 1], 1)
    error = float(np.std(logs[:, 1] - (exponent * logs[:, 0] + offset)))
    return PowerLaw(math.exp(offset), float(exponent), error)


def scaling_line(points: Sequence[ScalingPoint], law: PowerLaw) -> str:
    """The fit in one line."""
    return (
        f"loss against compute, {len(points)} runs: loss = {law.factor:.3g} * FLOPs^{law.exponent:.4f} "
        f"(spread of the points around it {law.error:.1%})"
    )


def scaling_figure(points: Sequence[ScalingPoint], law: PowerLaw) -> Figure:
    """The points and the line through them, both axes logarithmic."""
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([point.flops for point in points], [point.loss for point in points], "o", color=COLOUR)
    ends = np.array([points[0].flops / 1.5, points[-1].flops * 1.5])
    axis.plot(ends, [law(flops) for flops in ends], color=COLOUR, linewidth=1, linestyle="--")
    for point in points:
        name = point.name.replace("$", r"\$")
        axis.annotate(name, (point.flops, point.loss), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("training FLOPs (6 × parameters × tokens)")
    axis.set_ylabel("validation loss (nats per token)")
    axis.grid(alpha=0.25, linewidth=0.6, which="both")
    axis.set_title(scaling_line(points, law).partition(": ")[2], fontsize=9, loc="left")
    return figure
