"""From the tail into pages: the tokens of each batch row that are seen and worth keeping."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .allowance import excess, spare_bytes
from .autocast import without_autocast
from .checks import naming
from .eviction import kept
from .records import settle_held, settled
from .room import Room
from .shared import rows_by_visibility
from .span import Span

if TYPE_CHECKING:
    from .layer import PagedLayer

# Batch rows that are alike, and the columns of the tail that they see: None = all.
Groups = list[tuple[list[int], Tensor | None]]


@without_autocast
def seal_excess(layer: "PagedLayer", mask: Tensor | None) -> int:
    """Seal what is due of the layer's tail, and return how many of its oldest tokens that were.

    `mask` is the newest one of the model.
    """
    count, due = excess(layer) if layer.seen >= layer.due else (0, layer.due)
    if count > 0:
        layer.shared.note_sealed()
        seal_oldest(layer, count, mask)
    elif not layer.pages.slabs and layer.observed.is_pending(
        layer.generated, layer.pages.page_size
    ):
        layer.shared.note_sealed()
        settle_held(layer, mask)
    layer.due = due
    return count


def seal_oldest(layer: "PagedLayer", count: int, mask: Tensor | None) -> None:
    """Seal the oldest `count` tokens of the layer's tail; `mask` is the newest one of the model.

    Raises:
        ValueError: the compressor cannot store them.
    """
    oldest = layer.tail.span(layer.seen - layer.tail.length, count)
    compressor = layer.pages.compressor
    groups = _groups(layer, count, mask)
    _note_padding(layer, count, groups)
    for rows, columns in groups:
        span = oldest if len(rows) == layer.tail.batch else oldest.rows(torch.tensor(rows))
        if columns is not None:
            span = span.tokens(columns)
        new, room = span, Room(spare_bytes(layer))
        for row in rows:
            layer.left[row] += len(span)
        if layer.shared.scheduler is not None:
            span, room = kept(layer, rows, span, count, layer.shared.scheduler, mask)
        if not len(span):
            continue  # nothing stays
        queries = layer.observed.of_rows(rows, compressor.observed_queries)
        if queries is not None:
            queries = queries.flatten(2, 3) * layer.scale
        with naming(layer):
            layer.pages.append(span, rows, layer.tail.batch, queries, room)
            _examine(layer, rows, new, queries)
    _end_records(layer, count, groups, mask)
    if oldest["keys"].device.type == "cpu":
        layer.shared.sealed_bytes += oldest["keys"].nbytes + oldest["values"].nbytes


def _note_padding(layer: "PagedLayer", count: int, groups: Groups) -> None:
    """Note which of the oldest `count` open tokens are in none of `groups`."""
    batch, visible = layer.tail.batch, None
    if sum(len(rows) for rows, _ in groups) < batch or any(c is not None for _, c in groups):
        visible = torch.zeros(batch, count, dtype=torch.bool)
        for rows, columns in groups:
            seen = torch.arange(count) if columns is None else columns
            visible[torch.tensor(rows)[:, None], seen] = True
    layer.shared.padding.append(layer.seen - layer.tail.length, visible, count)


def _end_records(layer: "PagedLayer", count: int, groups: Groups, mask: Tensor | None) -> None:
    """Settle the rows that sealed nothing, too; `count` tokens are open no more."""
    if layer.observed.pending is not None:
        busy = {row for rows, _ in groups for row in rows}
        for row in set(range(layer.tail.batch)) - busy:
            settled(layer, [row], None, mask)
        layer.observed.settle()
    layer.observed.drop(count)


def _examine(layer: "PagedLayer", rows: list[int], new: Span, queries: Tensor | None) -> None:
    """Guard and probe look at what sealing does to the tokens `new`, dropped ones included.

    Not at what was sealed: that may hold tokens which were decoded, so that no original is left.
    """
    layer.guard.check(layer.pages, new, queries, layer.left[rows[0]], layer.layer_idx)
    asked = layer.observed.of_rows(rows, layer.probe.observed_queries)
    if asked is not None:
        pages = layer.pages.apart(new, queries)
        layer.probe.measure(new, pages, asked.flatten(2, 3), layer.scale, layer.latent_rank)


def _groups(layer: "PagedLayer", count: int, mask: Tensor | None) -> Groups:
    """Batch rows whose first `count` tail columns are alike: (rows, visible columns or None).

    A column that the newest query may not see is padding, which never enters a page.
    """
    key = (mask, layer.tail.length, count, layer.tail.batch)
    groups = layer.shared.remember("groups", key, lambda: rows_by_visibility(*key))
    if layer.shared.scheduler is None:
        return groups
    split: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for number, (rows, _) in enumerate(groups):
        for row in rows:
            alike = number, layer.left[row], layer.pages.signature(row)
            split.setdefault(alike, []).append(row)
    return [(rows, groups[number][1]) for (number, *_), rows in split.items()]
