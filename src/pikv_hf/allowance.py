"""How many tokens a layer may hold: open ones in its tail, and sealed ones in pages."""

from typing import TYPE_CHECKING

from torch import Tensor

from .beside import bytes_beside
from .pages import MAX_GROWTH, MIN_GROWTH
from .shared import visible_columns

if TYPE_CHECKING:
    from .layer import PagedLayer


def excess(layer: "PagedLayer") -> tuple[int, int]:
    """How many of the oldest open tokens are to be sealed now, in whole pages.

    Besides, how many tokens the layer must have seen before more of them have to be.
    """
    window, page_size, opened = layer.shared.window, layer.shared.page_size, layer.tail.length
    rows = _row_windows(layer) if layer.shared.has_share else set()
    # A row whose own tokens are too few for a page does not shorten the tail of the others.
    full = [now for held, now, _ in rows if held >= now + page_size]
    count = max(opened - min([window, *full]), 0) // page_size * page_size
    opened -= count
    missing = [min(now, later) - min(held, opened) for held, now, later in rows]
    return count, layer.seen + max(min([window - opened, *missing]) + page_size, 1)


def _row_windows(layer: "PagedLayer") -> set[tuple[int, int, int]]:
    """Of each batch row, its open tokens, and its window now and with one more token generated."""
    tail = layer.tail
    key = (layer._mask, tail.length, tail.batch)
    opened = layer.shared.remember("opened", key, lambda: _opened(*key))
    seen = {(held, left + held) for held, left in zip(opened, layer.left, strict=True)}
    return {(held, row_window(layer, n), row_window(layer, n + 1, 1)) for held, n in seen}


def _opened(mask: Tensor | None, length: int, batch: int) -> list[int]:
    """How many of the last `length` columns each batch row sees; the others are padding."""
    visible = visible_columns(mask, length)
    if visible is None:
        return [length] * batch
    return visible.sum(-1).expand(batch).tolist()


def row_window(layer: "PagedLayer", seen: int, newer: int = 0) -> int:
    """How many of the newest tokens of a row stay open after `seen`, `newer` of them to come.

    The window must fit into a budget that is a share, whatever that comes to; if it is the default,
    into half of it, so that the scheduler has a choice.
    """
    shared, generated = layer.shared, layer.generated + newer
    if shared.budget is None or not isinstance(shared.budget.in_force(generated), float):
        return shared.window
    tokens = _tokens_held(layer, seen, generated)
    assert tokens is not None, "a share is a number of tokens"
    most = tokens - 1 if shared.has_given_window else tokens // 2
    return max(min(shared.window, most, tokens - shared.least), 1)


def sealed_tokens(layer: "PagedLayer", seen: int, left: int) -> int | None:
    """How many tokens of each KV head of a row may be in pages; None = all.

    Of `seen` tokens of the row `left` have left the tail.
    """
    tokens = _tokens_held(layer, seen, layer.generated)
    scheduler, least = layer.shared.scheduler, layer.shared.least
    if tokens is None or scheduler is None:
        return None
    free = max(tokens - row_window(layer, seen) - least, 0)
    return least + scheduler.layer_budget(free, max(left - least, 0), *layer.place)


def _tokens_held(layer: "PagedLayer", seen: int, generated: int) -> int | None:
    """How many tokens of each KV head of a row may be held, open ones included; None = all."""
    budget, scheduler = layer.shared.budget, layer.shared.scheduler
    if budget is not None:
        return budget.tokens(seen, generated, lambda nbytes: _tokens_in(layer, nbytes))
    return None if scheduler is None else scheduler.budget(seen)


def _tokens_in(layer: "PagedLayer", nbytes: int) -> int:
    """Tokens of each row and KV head, open ones included, for which `nbytes` of a cache suffice.

    Raises:
        ValueError: they do not suffice for the open tokens alone.
    """
    shared, tail = layer.shared, layer.tail
    beside = bytes_beside(layer)
    share = max(nbytes - beside, 0) // (layer.place[1] - len(shared.unpaged))
    owners, size = tail.batch * tail.keys.shape[1], tail.keys.element_size()
    dims = tail.keys.shape[3], tail.values.shape[3]
    fixed = (shared.window + shared.page_size) * sum(dims) * size * owners
    others = [*layer.observed.tensors(), *layer.pages.compressor.tensors()]
    others += layer.scheduler_tensors()
    fixed += sum(tensor.nbytes for tensor in others if tensor is not layer.observed.counted)
    per_token = layer.pages.compressor.bytes_per_token(*dims, size)
    # Its position, its record, and the one that attention adds to; what never changes.
    per_token += 4 + 4 * (layer.observed.numbers + layer.observed.width)
    per_token += 4 * shared.scheduler.constants if shared.scheduler else 0
    if tail.labels is not None:
        labels = tail.labels.tensors.values()
        per_token += sum(t[0, 0, 0].numel() * t.element_size() for t in labels)
    if share <= fixed:
        raise ValueError(
            f"`budget` is {nbytes} bytes, of which layers that are not paged and token ids take "
            f"{beside}. That leaves {share} for layer {layer.layer_idx}, but its open tokens alone "
            f"take {fixed} in this batch of {tail.batch}: give more, or a smaller `window`, "
            "`page_size` or batch."
        )
    sealed = int((share - fixed) / (owners * per_token))
    # Room that pages are given for later ones, and a page that is not full.
    room = min(max(sealed // 17, MIN_GROWTH * shared.page_size), MAX_GROWTH * shared.page_size)
    return max(sealed - room - shared.page_size, 0) + shared.window
