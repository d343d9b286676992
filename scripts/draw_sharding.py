"""The picture of `simulate_sharding.py`: one column a model, one row a question."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# What panels show of all ranks and tokens.
RANKS, TOKENS = 8, 128 * 1024


class Style(NamedTuple):
    """How a line looks: a color of Okabe and Ito's colour-blind safe set, a marker, a dash."""

    color: str
    marker: str
    dash: str


STYLES = {
    "all KV on each rank": Style("#000000", "s", "--"),
    "one all-gather (PiKVCache)": Style("#0072B2", "o", "-"),
    "two collectives": Style("#E69F00", "^", "-"),
    "DCP as in vLLM": Style("#009E73", "D", "-."),
    "gather KV": Style("#D55E00", "v", ":"),
    "spread": Style("#0072B2", "o", "-"),
    "experts": Style("#CC79A7", "P", "-"),
    "pikv_xor": Style("#D55E00", "X", "--"),
}


def line(axes: Axes, name: str, points: list[tuple[int, float | None]], label: str = "") -> None:
    """Draw the points that have a value, in the style of `name`."""
    known = [(x, y) for x, y in points if y is not None]
    style = STYLES[name]
    axes.plot(
        *zip(*known, strict=True),
        color=style.color,
        marker=style.marker,
        linestyle=style.dash,
        markersize=5,
        linewidth=1.8,
        label=label or name,
    )


def tokens_text(count: float, _: int = 0) -> str:
    """Return tokens as text: 131072 is 128k."""
    thousands = round(count / 1024)
    return f"{thousands // 1024}M" if thousands >= 1024 else f"{thousands}k"


def rank_text(count: float, _: int = 0) -> str:
    """Return a number of ranks as text."""
    return f"{count:g}"


def bytes_text(count: float | None, _: int = 0) -> str:
    """Return bytes as text of three digits, in decimal units; None is "-"."""
    if count is None:
        return "-"
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, factor = next((u for u in units if count >= u[1]), ("B", 1))
    return f"{count / factor:.3g} {unit}"


def ms_text(ms: float | None, _: int = 0) -> str:
    """Return milliseconds as text of three digits; None is "-"."""
    if ms is None:
        return "-"
    return f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}"


def draw_held(axes: Axes, record: dict[str, Any], model: str) -> None:
    """Draw the bytes on the fullest rank by the number of ranks."""
    rows = [
        row
        for row in record["placed"]
        if (row["model"], row["tokens"], row["zipf"]) == (model, TOKENS, 0.0)
        and row["placement"] == "spread"
    ]
    whole = rows[0]["held"]
    line(axes, "all KV on each rank", [(row["ranks"], whole) for row in rows])
    points = [(row["ranks"], row["held"]) for row in rows]
    line(axes, "spread", points, "pages dealt to all ranks\n(placement 'spread')")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(bytes_text))


def draw_sent(axes: Axes, record: dict[str, Any], model: str) -> None:
    """Draw the bytes that a rank sends by the number of ranks."""
    for name in list(STYLES)[1:5]:
        rows = [row for row in record["sent"] if (row["model"], row["exchange"]) == (model, name)]
        line(axes, name, [(row["ranks"], row["bytes"] or None) for row in rows])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(bytes_text))


def draw_time(axes: Axes, record: dict[str, Any], model: str) -> None:
    """Draw the assumed time of a step by the number of tokens."""
    for name in list(STYLES)[:4]:
        rows = [row for row in record["time"] if (row["model"], row["exchange"]) == (model, name)]
        line(axes, name, [(row["tokens"], row["ms"]) for row in rows if row["ranks"] == RANKS])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(ms_text))


def draw_balance(axes: Axes, record: dict[str, Any], model: str) -> None:
    """Draw the balance of a layer by the number of tokens, the worst over expert popularities."""
    for name in ("spread", "experts", "pikv_xor"):
        worst: dict[int, float] = {}
        for row in record["placed"]:
            if (row["model"], row["placement"], row["ranks"]) == (model, name, RANKS):
                tokens = row["tokens"]
                worst[tokens] = max(worst.get(tokens, 0.0), row["per_layer"])
        line(axes, name, list(worst.items()))


class Panel(NamedTuple):
    """A row of the picture: what it draws, the quantity with its unit, the title of the legend."""

    draw: Callable[[Axes, dict[str, Any], str], None]
    quantity: str
    question: str


PANELS = (
    Panel(
        draw_held,
        "bytes of KV on the fullest rank\n(128k tokens)",
        "What is held on a rank?",
    ),
    Panel(
        draw_sent,
        "bytes sent by a rank in a decode step\n(128k tokens)",
        "What do ranks send each other?\n(DCP: at most as many ranks\nas query heads)",
    ),
    Panel(
        draw_time,
        f"ASSUMED ms of a decode step\nfor its KV cache ({RANKS} ranks)",
        "When does it save time?\n(reading KV, sending, latency;\nnot weights, not experts)",
    ),
    Panel(
        draw_balance,
        f"pages of a layer on the fullest of\n{RANKS} ranks / mean (1.0 = even)",
        "How even is each placement?\n(worst of expert popularities\nZipf 0, 0.5 and 1)",
    ),
)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the results of `simulate_sharding.py` to a PNG at `path`."""
    given = record["assumptions"]
    models = list(dict.fromkeys(row["model"] for row in record["placed"]))
    figure, grid = plt.subplots(
        len(PANELS), len(models), figsize=(16, 15), sharey="row", layout="constrained"
    )
    for row, panel in zip(grid, PANELS, strict=True):
        by_tokens = panel.draw in (draw_time, draw_balance)
        for axes, model in zip(row, models, strict=True):
            panel.draw(axes, record, model)
            axes.set_title(model, fontsize=12, weight="bold")
            axes.set_xscale("log", base=2)
            xs = sorted({int(x) for each in axes.lines for x in each.get_xdata()})
            axes.xaxis.set_major_locator(FixedLocator(xs))
            axes.xaxis.set_minor_locator(NullLocator())
            text = tokens_text if by_tokens else rank_text
            axes.xaxis.set_major_formatter(FuncFormatter(text))
            axes.set_xlabel("tokens of context" if by_tokens else "ranks (GPUs)")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(panel.quantity, fontsize=12)
        legend = row[-1].legend(
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            fontsize=11,
            frameon=False,
            title=panel.question,
            title_fontproperties={"size": 11, "weight": "bold"},
        )
        legend.set_alignment("left")
    figure.suptitle(
        "SIMULATED, not measured: a KV cache spread over 1 to 64 GPUs, for four models\n"
        f"assumed: {given['hbm'] / 1e12:g} TB/s memory, {given['link'] / 1e9:g} GB/s link, "
        f"{given['latency'] * 1e6:g} us a collective, batch {given['batch']}, bfloat16",
        fontsize=15,
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)
