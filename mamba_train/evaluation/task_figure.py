"""Accuracy on a synthetic task over the length."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from mamba_train.config_data import SyntheticTask
from mamba_train.evaluation.length_axis import INK, draw_length_axis


def task_figure(task: SyntheticTask, trained_length: int, by_length: Mapping[int, float]) -> Figure:
    """One point for each length, and a line where the training was."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axis = figure.subplots()
    lengths = sorted(by_length)
    axis.plot(lengths, [100 * by_length[length] for length in lengths], color=INK, marker="o")
    draw_length_axis(axis, trained_length, height=0.1)
    axis.set_ylim(0, 103)
    axis.set_xlabel("length (tokens)")
    axis.set_ylabel("accuracy (%)")
    axis.set_title(task.value.replace("_", " "), fontsize=11, loc="left")
    return figure
