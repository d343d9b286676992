"""The picture of the demo. matplotlib is imported only when it is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.text import Annotation

NEAR = 11
OFFSETS = [
    (side * NEAR, height) for height in (NEAR, -NEAR, 26, -26, 41, -41, 56, 71) for side in (1, -1)
]
"""Offsets of a label from its point, in typographic points; the first free one is taken."""


def accuracy_against_memory(
    labels: Sequence[str],
    mebibytes: Sequence[float],
    accuracy: Sequence[float],
    title: str,
    path: Path,
) -> None:
    """Write a scatter plot to `path`: memory on the x axis, accuracy on the y axis, by cache."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.11, 0.89, 0.81))
    points = list(zip(mebibytes, accuracy, strict=True))
    for index, point in enumerate(points):
        axes.scatter(*point, s=70, color=f"C{index}", alpha=0.8, zorder=3, clip_on=False)
    axes.set(xlim=(0, 1.08 * max(mebibytes)), ylim=(-6, 116), yticks=range(0, 101, 20))
    axes.set(xlabel="KV cache held after the answer, MiB", ylabel="exact answers, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, points, labels, canvas.get_renderer())
    figure.savefig(path)


def _label(
    axes: "Axes",
    points: list[tuple[float, float]],
    labels: Sequence[str],
    renderer: "RendererBase",
) -> None:
    """Write each label beside its point, at the first offset that covers no point or label."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent(renderer)
    centers = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_extents(*(center - 10), *(center + 10)) for center in centers]
    for index, (point, label) in enumerate(zip(points, labels, strict=True)):
        for offset in OFFSETS:
            text = _annotate(axes, point, label, offset, f"C{index}")
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line to its point
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0
            if (inside and not any(box.overlaps(b) for b in taken)) or offset == OFFSETS[-1]:
                taken.append(box)
                break
            text.remove()


def _annotate(
    axes: "Axes", point: tuple[float, float], label: str, offset: tuple[int, int], color: str
) -> "Annotation":
    """Write `label` at `offset` from `point`, with a line between them if they are far apart."""
    side = 0 if offset[0] > 0 else 1
    line = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkB": 4, "relpos": (side, 0.5)}
    return axes.annotate(
        label,
        point,
        offset,
        textcoords="offset points",
        ha=("left", "right")[side],
        va="center",
        fontsize=9,
        color=color,
        arrowprops=line if abs(offset[1]) > NEAR else None,
    )
