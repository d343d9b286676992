"""Draw docs/step.png, the data flow of one step of a layer: python scripts/draw_step.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parents[1] / "docs" / "step.png"
MODEL, STEP, STORE = "#dfe7f3", "#fdf1d3", "#e3f1e1"

# Text, left, bottom, width, height, color.
BOXES = {
    "module": ("attention module", 0.0, 7.2, 3.2, 0.9, MODEL),
    "gate": ("gate of the experts", 13.2, 7.2, 3.4, 0.9, MODEL),
    "update": ("update\nappend keys and values", 0.0, 4.6, 3.2, 1.3, STEP),
    "attend": (
        "attend\nthe tail, and the pages that the\nrouter selects",
        4.4,
        4.6,
        3.8,
        1.3,
        STEP,
    ),
    "observed": ("observations\nqueries, token statistics", 9.4, 4.6, 3.0, 1.3, STORE),
    "label": ("label\nexperts of the tokens", 13.2, 4.6, 3.4, 1.3, STEP),
    "evict": ("evict\nscheduler: which tokens stay", 13.2, 2.2, 3.4, 1.2, STEP),
    "tail": ("tail\nnewest tokens, model dtype", 0.0, 0.0, 3.2, 1.3, STORE),
    "pages": (
        "pages\ncodes, positions, labels: on the\ndevice, in RAM or on disk",
        4.4,
        0.0,
        3.8,
        1.3,
        STORE,
    ),
    "seal": ("seal\ncompressor encodes,\nplacement chooses a tier", 9.3, 2.0, 3.2, 1.4, STEP),
}
# From, its side, to, its side, label, where the label stands.
ARROWS = [
    ("module", "bottom", "update", "top", "keys, values", (2.6, 6.6)),
    ("module", "right", "attend", "top", "queries", (5.9, 7.0)),
    ("update", "bottom", "tail", "top", "", None),
    ("tail", "right", "attend", "bottom left", "", None),
    ("pages", "top", "attend", "bottom", "", None),
    ("attend", "right", "observed", "left", "queries", (8.8, 5.65)),
    ("gate", "bottom", "label", "top", "", None),
    ("label", "bottom", "evict", "top", "tokens that\nleave the tail", (16.0, 4.0)),
    ("observed", "bottom right", "evict", "left top", "", None),
    ("evict", "left", "seal", "right", "", None),
    ("seal", "bottom", "pages", "right", "", None),
]
CURVED = {("module", "attend"), ("seal", "pages")}
SIDES = {
    "top": (0.5, 1.0),
    "bottom": (0.5, 0.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "bottom left": (0.25, 0.0),
    "bottom right": (0.8, 0.0),
    "left top": (0.05, 1.0),
}


def side(name: str, where: str) -> tuple[float, float]:
    _, x, y, width, height, _ = BOXES[name]
    across, up = SIDES[where]
    return x + across * width, y + up * height


def draw(axes: Axes) -> None:
    for text, x, y, width, height, color in BOXES.values():
        box = FancyBboxPatch((x, y), width, height, "round,pad=0.08", fc=color, ec="#555")
        axes.add_patch(box)
        title, _, rest = text.partition("\n")
        up = y + height / 2 + (0.16 * (1 + rest.count("\n")) if rest else 0)
        axes.text(x + width / 2, up, title, ha="center", va="center", weight="bold", size=10)
        if rest:
            axes.text(x + width / 2, up - 0.22, rest, ha="center", va="top", size=8.5)
    for start, start_side, end, end_side, text, place in ARROWS:
        bend = -0.2 if (start, end) in CURVED else 0.0
        axes.add_patch(
            FancyArrowPatch(
                side(start, start_side),
                side(end, end_side),
                arrowstyle="-|>",
                mutation_scale=14,
                connectionstyle=f"arc3,rad={bend}",
                color="#333",
                shrinkA=6,
                shrinkB=6,
            )
        )
        if place is not None:
            axes.text(*place, text, size=8.5, ha="center", va="center", color="#333")
    axes.set_xlim(-0.3, 17.4)
    axes.set_ylim(-0.3, 8.4)
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    figure, axes = plt.subplots(figsize=(12.5, 6.2))
    draw(axes)
    figure.savefig(OUT, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
