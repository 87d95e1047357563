"""Accuracy on a synthetic task over the length."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from mamba_train.config_data import SyntheticTask

INK, TRAINED = "#0072B2", "#444444"


def task_figure(task: SyntheticTask, trained_length: int, by_length: Mapping[int, float]) -> Figure:
    """One point for each length, and a line where the training was."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axis = figure.subplots()
    lengths = sorted(by_length)
    axis.plot(lengths, [100 * by_length[length] for length in lengths], color=INK, marker="o")
    axis.axvline(trained_length, color=TRAINED, linestyle="--", linewidth=1)
    axis.annotate(
        "trained at",
        (trained_length, 0.05),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        fontsize=9,
        color=TRAINED,
    )
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 103)
    axis.set_xlabel("length (tokens)")
    axis.set_ylabel("accuracy (%)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(task.value.replace("_", " "), fontsize=11, loc="left")
    return figure
