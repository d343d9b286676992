"""How many tokens a layer may hold: open ones in its tail, and sealed ones in pages."""

import itertools
import math
from typing import TYPE_CHECKING

from torch import Tensor

from .beside import bytes_beside
from .compressors import MixedCompressor
from .memory import storage_bytes
from .moving import rest_bytes
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
    """Return the open tokens of each row, its window now, and one generated token later."""
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
    """Tokens of each row and KV head, open ones included, for which `nbytes` of a cache suffice."""
    shared = layer.shared
    pages = int(_bytes_for_pages(layer, nbytes) / _page_row_bytes(layer))
    # Where heads hold different numbers of tokens, or of bytes, the last page of each is not full.
    pages -= _is_pooled(layer)
    return shared.window + max(pages, 0) * shared.page_size


def spare_bytes(layer: "PagedLayer") -> int:
    """Bytes of room that pages may have, so that a cache takes little more than its tokens.

    A quarter of all tokens seen, less a page of the tail, which it has room for as well.
    """
    return max(layer.seen // 4 - layer.shared.page_size, 0) * layer.tail.token_bytes


def page_bytes(layer: "PagedLayer") -> int | None:
    """Bytes that the pages of a layer may take; None = the budget is not one in bytes."""
    budget = layer.shared.budget
    nbytes = None if budget is None else budget.bytes_in_force(layer.generated)
    return None if nbytes is None else _bytes_for_pages(layer, nbytes)


def _bytes_for_pages(layer: "PagedLayer", nbytes: int) -> int:
    """Return the bytes that a cache of `nbytes` leaves to the pages of a layer.

    Raises:
        ValueError: its open tokens and sinks take more than its share.
    """
    shared, tail = layer.shared, layer.tail
    beside = bytes_beside(layer)
    share = max(nbytes - beside, 0) // (layer.place[1] - len(shared.unpaged))
    opened = shared.window + shared.page_size
    owners, states = tail.batch * tail.keys.shape[1], (tail.keys, tail.values)
    fixed = opened * owners * sum(t.shape[3] * t.element_size() for t in states)
    fixed += opened * tail.batch * _label_bytes(layer)
    fixed += layer.observed.most_bytes(owners, opened, shared.page_size)
    others = (layer.pages.compressor.tensors(), layer.scheduler_tensors(), layer.probe.tensors())
    fixed += storage_bytes(itertools.chain(*others))
    sinks = math.ceil(shared.least / shared.page_size)
    least = fixed + (sinks + _is_pooled(layer) * (sinks > 0)) * _page_row_bytes(layer)
    if share <= fixed or share < least:
        raise ValueError(
            f"`budget` is {nbytes} bytes, of which layers that are not paged and token ids take "
            f"{beside}. That leaves {share} for layer {layer.layer_idx}, but its open tokens "
            f"and sinks alone take {math.ceil(least)} in this batch of {tail.batch}: give more, or a "
            "smaller `window`, `page_size` or batch."
        )
    return share - fixed


def _page_row_bytes(layer: "PagedLayer") -> float:
    """Bytes of a page of each KV head of all rows."""
    tail = layer.tail
    return tail.batch * tail.keys.shape[1] * layer.shared.page_size * token_bytes(layer)


def token_bytes(layer: "PagedLayer") -> float:
    """Bytes that a token of one KV head takes in a full page, with all that is known of it."""
    shared, tail = layer.shared, layer.tail
    dims, size = (tail.keys.shape[3], tail.values.shape[3]), tail.keys.element_size()
    total = layer.pages.compressor.bytes_per_token(*dims, size, shared.page_size)
    # Its position, its record, and the one that attention adds to; what never changes.
    total += 4 + 4 * (layer.observed.numbers + layer.observed.width) + _label_bytes(layer)
    if shared.scheduler is not None:
        total += 4 * shared.scheduler.constants + rest_bytes(layer, shared.scheduler)
    # The owner of a page and its length.
    return total + _is_pooled(layer) * 12 / shared.page_size


def _is_pooled(layer: "PagedLayer") -> bool:
    """Tell if KV heads differ in their number of pages or in the encodings of their pages."""
    scheduler = layer.shared.scheduler
    is_ragged = scheduler is not None and scheduler.is_ragged
    return is_ragged or isinstance(layer.pages.compressor, MixedCompressor)


def _label_bytes(layer: "PagedLayer") -> int:
    """Bytes of a token's experts and their weights."""
    labels = layer.tail.labels
    tensors = () if labels is None else labels.tensors.values()
    return sum(t[0, 0, 0].numel() * t.element_size() for t in tensors)
