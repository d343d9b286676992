"""A picture of what a cache holds and reads. matplotlib is imported only when it is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer.page_experts import pages_per_expert
from ..layer.state import LayerState
from ..storage.selected import Selection
from .paged_cache import PagedCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that colour-blind people tell apart (Okabe and Ito), of what is not held, held and read.
COLOURS = {"not held": "#e6e6e6", "held": "#56b4e9", "read": "#d55e00"}
# Most columns of the heat map. A column for several tokens shows the most that any of them has.
MAX_COLUMNS = 1024


def draw(cache: PagedCache, row: int) -> "Figure":
    """Draw what a batch `row` holds, and has read last; see `PiKVCache.plot`."""
    from matplotlib.figure import Figure

    states = [state for state in cache.states if state.is_written and not state.unpaged_reason]
    if not states:
        raise ValueError(
            "the cache has no paged layer with tokens, so that there is nothing to draw."
        )
    if not (isinstance(row, int) and 0 <= row < states[0].tail.batch):
        raise ValueError(f"`row` is {row!r}; it must be from 0 to {states[0].tail.batch - 1}.")
    experts = [pages_per_expert(state.pages.slabs) for state in states]
    recalls = [state.routing.recall for state in states]
    panels = ["tokens"]
    panels += ["experts"] if any(counts is not None for counts in experts) else []
    panels += ["recall"] if any(recall is not None for recall in recalls) else []
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    ratios = [3, 1.2, 0.8][: len(panels)]
    drawn = figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False)[0]
    axes: dict[str, Any] = dict(zip(panels, drawn, strict=True))
    _draw_tokens(axes["tokens"], states, row)
    names = [str(state.layer_idx) for state in states]
    if "experts" in axes:
        width = max(len(counts) for counts in experts if counts is not None)
        table = [(counts or []) + [0] * (width - len(counts or [])) for counts in experts]
        image = axes["experts"].imshow(
            table, aspect="auto", cmap="cividis", interpolation="nearest"
        )
        axes["experts"].set(xlabel="expert", title="pages per expert")
        axes["experts"].set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=axes["experts"], location="bottom", shrink=0.9)
    if "recall" in axes:
        shown = [0.0 if recall is None else recall for recall in recalls]
        axes["recall"].barh(range(len(shown)), shown, color=COLOURS["read"])
        axes["recall"].set(xlabel="share of attention", title="recall", xlim=(0, 1))
        axes["recall"].set_yticks(range(len(names)), names)
        axes["recall"].invert_yaxis()
    return figure


def _draw_tokens(axes: Any, states: Sequence[LayerState], row: int) -> None:
    """Draw a line for each layer and KV head, with the tokens from left to right."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    seen, heads = states[0].num_seen, states[0].tail.keys.shape[1]
    each = -(-seen // MAX_COLUMNS)
    whole = torch.cat([_tokens(state, row) for state in states])
    whole = F.pad(whole, (0, -seen % each)).unflatten(1, (-1, each)).amax(2)
    colours = ListedColormap(list(COLOURS.values()))
    extent = (0, whole.shape[1] * each, len(states), 0)
    options = {"aspect": "auto", "interpolation": "nearest", "vmin": 0, "vmax": 2}
    axes.imshow(whole.numpy(), cmap=colours, extent=extent, **options)
    axes.set_yticks([i + 0.5 for i in range(len(states))], [str(s.layer_idx) for s in states])
    for line in range(1, len(states)):
        axes.axhline(line, color="white", linewidth=0.8)
    what = "a line for each KV head" if heads > 1 else "one KV head"
    axes.set(
        xlabel="position",
        ylabel=f"layer, {what}",
        title="tokens held and last read",
        xlim=(0, seen),
    )
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes.legend(
        handles=patches, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False
    )


def _tokens(state: LayerState, row: int) -> Tensor:
    """Return [H, columns] uint8 of a batch row: 0 = not held, 1 = held, 2 = read last."""
    found = torch.zeros(state.tail.keys.shape[1], state.num_seen, dtype=torch.uint8)
    for store in state.pages.slabs:
        if row in store.readers:
            stored = store.stored_of([row])[0]
            _mark(found, Selection.of_row(store, stored), 0, 1 if state.routing.reads else 2)
    for read in state.routing.reads or ():
        if row in read.readers and read.selection is not None:
            _mark(found, read.selection, read.readers.index(row), 2)
    found[:, state.starts[row] :] = 2
    hidden = state.columns.hidden
    if hidden is not None:
        found[:, : hidden.shape[1]].masked_fill_(hidden[row], 0)
    return found


def _mark(found: Tensor, selection: Selection, reader: int, what: int) -> None:
    """Write `what` to the places in `found` [H, columns] of the tokens of one reader."""
    columns, is_read = (t[reader].flatten(1).cpu().long() for t in selection.columns())
    # Places without a token get the number that is there already.
    columns = columns.clamp(0, found.shape[1] - 1)
    found.scatter_reduce_(1, columns, (is_read * what).to(found.dtype), "amax")
