"""The curves of a report, drawn with matplotlib without a display.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; layers go along cividis.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mamba_train.monitor.run_record import RunRecord, Series

RUN_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":"]
BASELINE_COLOUR = "#444444"
MAX_POINTS = 3000
MAX_LAYERS_WITH_BAND = 6
CURVES_INCHES = (13.0, 7.6)
HEALTH_INCHES = (13.0, 10.0)


def curves_figure(runs: Sequence[RunRecord]) -> Figure:
    """Loss, bits per byte, gradient norm, learning rate and tokens/s of one or several runs."""
    figure = Figure(figsize=CURVES_INCHES, layout="constrained")
    draw_curves(figure, runs)
    return figure


def health_figure(run: RunRecord) -> Figure:
    """Δ, A and memory length per layer, over the steps and at the last observed step."""
    figure = Figure(figsize=HEALTH_INCHES, layout="constrained")
    draw_health(figure, run)
    return figure


def report_figure(runs: Sequence[RunRecord]) -> Figure:
    """The curves, and below them the SSM health when there is one run that has it."""
    if len(runs) > 1 or runs[0].n_layers_observed == 0:
        return curves_figure(runs)
    (width, curves_height), (_, health_height) = CURVES_INCHES, HEALTH_INCHES
    figure = Figure(figsize=(width, curves_height + health_height), layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=[curves_height, health_height])
    draw_curves(figure.add_subfigure(rows[0]), runs)
    draw_health(figure.add_subfigure(rows[1]), runs[0])
    return figure


def png(figure: Figure) -> bytes:
    """Render a figure; a Figure made without pyplot draws with Agg."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()


def draw_curves(figure: Figure | SubFigure, runs: Sequence[RunRecord]) -> None:
    """Two wide panels (loss, bits per byte) above three (gradient norm, learning rate, tokens/s)."""
    grid = figure.add_gridspec(2, 6, height_ratios=[1.35, 1.0])
    loss = figure.add_subplot(grid[0, :3])
    bits = figure.add_subplot(grid[0, 3:])
    norm, rate, speed = (figure.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(3))
    for index, run in enumerate(runs):
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        style = LINE_STYLES[index // len(RUN_COLOURS) % len(LINE_STYLES)]
        _train_and_validation(loss, run, "loss", colour, style)
        _train_and_validation(bits, run, "bits_per_byte", colour, style)
        _noisy(norm, run.series("grad_norm"), colour, style)
        rate.plot(*_thin(run.series("lr")), color=colour, linestyle=style, linewidth=1.8)
        _noisy(speed, run.series("tokens_per_second"), colour, style)
        _mark_skipped(loss, run, colour)
    _bigram_lines(loss, runs, "nats_per_token")
    _bigram_lines(bits, runs, "bits_per_byte")
    _cut_start(loss, runs, "loss", "nats_per_token")
    _cut_start(bits, runs, "bits_per_byte", "bits_per_byte")
    _finish(loss, "Loss", "nats per token")
    _finish(bits, "Bits per byte", "bits per byte")
    _finish(norm, "Gradient norm", "before clipping")
    _finish(rate, "Learning rate", "")
    _finish(speed, "Speed", "tokens per second")
    if any(value > 0 for run in runs for value in run.series("grad_norm")[1]):
        _log_axis(norm)
    rate.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    loss.legend(handles=_legend(runs), loc="upper right", fontsize=9, framealpha=0.9)


SIGNS_OF_TROUBLE = (
    ("dt_floor_share", "Δ at its floor", "share of Δ below 0.0001"),
    ("dt_saturated_share", "Δ that leaves no memory", "share of Δ"),
    ("state_rms", "Size of the state", "root mean square"),
)


def draw_health(figure: Figure | SubFigure, run: RunRecord) -> None:
    """Top row: over the steps, one line per layer. Middle: by layer at the last observed step. Bottom: early signs."""
    n_layers = run.n_layers_observed
    axes = figure.subplots(3, 3)
    colours = colormaps["cividis"](np.linspace(0.0, 0.9, max(n_layers, 2)))
    panels = [
        ("dt_p05", "dt_p50", "dt_p95"),
        ("a_max", None, "a_min"),
        ("memory_p05", "memory_p50", "memory_p95"),
    ]
    titles = ["Step size Δ", "Decay rate |A|", "Memory length 1/(Δ|A|)"]
    units = ["softplus(dt + dt_bias)", "per unit of Δ", "tokens"]
    for column, (low, middle, high) in enumerate(panels):
        over_steps, by_layer = axes[0, column], axes[1, column]
        for layer in range(n_layers):
            ends = [_layer_series(run, layer, name) for name in (low, high)]
            centre = _layer_series(run, layer, middle) if middle else None
            if centre is not None:
                over_steps.plot(*centre, color=colours[layer], linewidth=1.6)
            if centre is None or n_layers <= MAX_LAYERS_WITH_BAND:
                for end in ends:
                    over_steps.plot(*end, color=colours[layer], linewidth=0.9, linestyle=":" if centre else "-")
            _interval(by_layer, layer, ends, centre, colours[layer], width=min(5.0, 160.0 / n_layers))
        quantiles = "median, 5 % and 95 %" if n_layers <= MAX_LAYERS_WITH_BAND else "median"
        _finish(over_steps, f"{titles[column]} ({quantiles if middle else 'least and greatest'})", units[column])
        _finish(by_layer, "", units[column], "layer (bar: 5 % to 95 %)" if middle else "layer (bar: full range)")
        by_layer.set_xlim(-0.7, n_layers - 0.3)
    if run.sequence_length is not None:
        for axis in axes[:2, 2]:
            axis.axhline(run.sequence_length, color=BASELINE_COLOUR, linestyle="--", linewidth=1)
            _note(axis, run.sequence_length, f"sequence length {run.sequence_length}")
    for axis in axes[:2].flat:
        _log_axis(axis)
    for axis, (name, title, unit) in zip(axes[2], SIGNS_OF_TROUBLE, strict=True):
        for layer in range(n_layers):
            axis.plot(*_layer_series(run, layer, name), color=colours[layer], linewidth=1.6)
        _finish(axis, title, unit)
        axis.set_ylim(bottom=0)
    scale = ScalarMappable(Normalize(0, max(n_layers - 1, 1)), colormaps["cividis"])
    ticks = MaxNLocator(integer=True)
    figure.colorbar(scale, ax=axes, fraction=0.015, pad=0.01, ticks=ticks).set_label("layer")
    figure.suptitle(f"SSM health per layer: {_literal(run.name)}", fontsize=12)


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average; the window shrinks at both ends, so the length stays."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, len(values) - 1 - places), window // 2)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS evenly spaced points, the last one included."""
    steps, values = np.asarray(series[0]), np.asarray(series[1])
    if len(steps) <= MAX_POINTS:
        return steps, values
    keep = np.linspace(0, len(steps) - 1, MAX_POINTS).astype(int)
    return steps[keep], values[keep]


def _noisy(axis: Axes, series: Series, colour: str, style: str) -> None:
    if not series[0]:
        return
    axis.plot(*_thin(series), color=colour, alpha=0.25, linewidth=0.8)
    smoothed = smooth(series[1], max(len(series[1]) // 40, 1))
    axis.plot(*_thin((series[0], list(smoothed))), color=colour, linestyle=style, linewidth=1.8)


def _train_and_validation(axis: Axes, run: RunRecord, name: str, colour: str, style: str) -> None:
    _noisy(axis, run.series(name), colour, style)
    steps, values = run.series(f"validation/{name}")
    if not steps:
        return
    every = max(len(steps) // 20, 1)
    axis.plot(
        *(steps, values),
        color=colour,
        marker="o",
        markevery=every,
        markersize=6,
        markeredgecolor="white",
        linewidth=1.0,
        linestyle=style,
        zorder=4,
    )
    axis.annotate(
        f"{values[-1]:.3f}",
        (steps[-1], values[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=colour,
    )


def _bigram_lines(axis: Axes, runs: Sequence[RunRecord], name: str) -> None:
    # Runs on the same text share their baseline: draw each value once.
    for value in sorted({round(run.bigram[name], 6) for run in runs if name in run.bigram}):
        axis.axhline(value, color=BASELINE_COLOUR, linestyle=(0, (6, 3)), linewidth=1.2)
        _note(axis, value, f"bigram {value:.3f}")


def _mark_skipped(axis: Axes, run: RunRecord, colour: str) -> None:
    if run.skipped_steps:
        bottom = axis.get_xaxis_transform()
        axis.plot(
            run.skipped_steps,
            [0.02] * len(run.skipped_steps),
            linestyle="",
            marker="^",
            color=colour,
            markeredgecolor="black",
            transform=bottom,
        )


def _layer_series(run: RunRecord, layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = _thin(run.series(f"ssm/layer_{layer:02d}/{name}"))
    return steps, np.abs(values)


def _interval(
    axis: Axes,
    layer: int,
    ends: Sequence[tuple[np.ndarray, np.ndarray]],
    centre: tuple[np.ndarray, np.ndarray] | None,
    colour: np.ndarray,
    width: float,
) -> None:
    if any(len(values) == 0 for _, values in ends):
        return
    axis.plot(
        [layer, layer],
        [values[-1] for _, values in ends],
        color=colour,
        linewidth=width,
        solid_capstyle="butt",
    )
    if centre is not None and len(centre[1]):
        axis.plot([layer], [centre[1][-1]], marker="o", color="white", markeredgecolor="black", markersize=width + 1)


def _note(axis: Axes, height: float, text: str) -> None:
    axis.annotate(
        text,
        (0.01, height),
        xycoords=("axes fraction", "data"),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=9,
        color=BASELINE_COLOUR,
    )


def _legend(runs: Sequence[RunRecord]) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            color=RUN_COLOURS[index % len(RUN_COLOURS)],
            linestyle=LINE_STYLES[index // len(RUN_COLOURS) % len(LINE_STYLES)],  # type: ignore[arg-type]
            label=_literal(run.name),
        )
        for index, run in enumerate(runs)
    ]
    grey = BASELINE_COLOUR
    handles.append(Line2D([], [], color=grey, linewidth=1.8, label="training (smoothed)"))
    handles.append(Line2D([], [], color=grey, marker="o", markeredgecolor="white", linewidth=1, label="validation"))
    if any(run.bigram for run in runs):
        handles.append(Line2D([], [], color=grey, linestyle=(0, (6, 3)), linewidth=1.2, label="bigram baseline"))
    if any(run.skipped_steps for run in runs):
        handles.append(Line2D([], [], color=grey, marker="^", linestyle="", label="skipped step"))
    return handles


def _cut_start(axis: Axes, runs: Sequence[RunRecord], name: str, baseline: str) -> None:
    # The fall of the first steps would leave the rest of a long run in a tenth of the panel.
    tops = [run.bigram[baseline] * 1.08 for run in runs if baseline in run.bigram]
    for run in runs:
        values = run.series(name)[1]
        if values:
            tops.append(max(values[len(values) // 50 :]))
    if tops:
        bottom, top = axis.get_ylim()
        axis.set_ylim(bottom, min(top, max(tops) + 0.03 * (max(tops) - bottom)))


def _literal(name: str) -> str:
    # matplotlib reads $...$ as mathematics, and leaves a label that begins with _ out of the legend.
    return name.replace("$", r"\$").removeprefix("_") or name


def _log_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    bottom, top = axis.get_ylim()
    decades = np.log10(top / bottom)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.2 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(_plain_number))


def _plain_number(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _finish(axis: Axes, title: str, unit: str, label: str = "step") -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(label, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_ylabel(unit, fontsize=9)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
