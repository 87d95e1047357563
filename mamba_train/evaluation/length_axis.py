"""An axis of lengths, as the figures of this room have it."""

from matplotlib.axes import Axes

INK, TRAINED = "#0072B2", "#444444"


def draw_length_axis(axis: Axes, trained_length: int | None, height: float) -> None:
    """Make the x-axis one of lengths in tokens, with a line where the training was.

    height: of the words beside the line, from 0 at the foot of the axis to 1.
    """
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if trained_length is None:
        return
    axis.axvline(trained_length, color=TRAINED, linestyle="--", linewidth=1)
    axis.annotate(
        "trained at",
        (trained_length, height),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=TRAINED,
    )
