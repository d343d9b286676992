"""What the queries of a layer say of each of its tokens, for schedulers that keep count.

Shapes: R rows, H KV heads, G query heads of each, m queries, T tokens, c numbers of a record.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .schedulers import Scheduler
from .schedulers.attention_mass import attention_weights
from .shared import visible_columns
from .span import Span

if TYPE_CHECKING:
    from .layer import PagedLayer


def settled(
    layer: "PagedLayer", rows: list[int], sealed: Span | None, mask: Tensor | None
) -> Span | None:
    """`sealed`, all sealed tokens of `rows`, with records that the pending queries have added to.

    Those of the tail are added to in place. `mask` is the newest one of the model, whose last
    columns are the tail's.
    """
    scheduler, tail, observed = layer.shared.scheduler, layer.tail, layer.observed
    assert scheduler is not None
    queries = observed.pending
    if queries is None:
        return sealed
    index = torch.tensor(rows, device=queries.device)
    if observed.counted is None:
        opened = _opened(layer, mask).rows(index)
        every = opened if sealed is None else sealed.then(opened)
        record = recorded(scheduler, every, queries[index], layer.seen, layer.scale)
    else:
        record = observed.counted[index]
    before = record.shape[2] - tail.length
    tail_record(layer)[index] = record[:, :, before:]
    if sealed is None:
        return None
    return sealed.joined(Span({"record": record[:, :, :before]}))


def _opened(layer: "PagedLayer", mask: Tensor | None) -> Span:
    """The open tokens of all rows: keys, records, positions, and which of them are seen."""
    tail = layer.tail
    device = tail.keys.device
    visible = visible_columns(mask, tail.length)
    if visible is None:
        visible = torch.ones(1, tail.length, dtype=torch.bool, device=device)
    positions = torch.arange(layer.seen - tail.length, layer.seen, device=device)[None, None]
    opened = Span({"keys": tail.view()[0], "record": tail_record(layer), "positions": positions})
    return opened.joined(Span({"valid": visible.expand(tail.batch, -1)[:, None]}))


def with_record(layer: "PagedLayer", rows: list[int], new: Span) -> Span:
    """`new`, open tokens of `rows`, with their records."""
    record = Span({"record": tail_record(layer)}).rows(torch.tensor(rows))
    first = layer.seen - layer.tail.length
    return new.joined(record.tokens(new["positions"][0, 0] - first))


@without_autocast
def settle_held(layer: "PagedLayer", mask: Tensor | None) -> None:
    """Settle a layer that does not seal: what is pending is too much to keep."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in range(layer.tail.batch):
        groups.setdefault(layer.pages.signature(row), []).append(row)
    for rows in groups.values():
        sealed = settled(layer, rows, layer.pages.take(rows, with_values=False), mask)
        if sealed is not None:
            layer.pages.append(sealed.front(), rows, layer.tail.batch)
    layer.observed.settle()


def tail_record(layer: "PagedLayer") -> Tensor:
    """The records of the open tokens [B, H, n, c]; new tokens start with zeros."""
    observed, tail = layer.observed, layer.tail
    shape = *tail.keys.shape[:2], tail.length, observed.numbers
    if observed.record is None:
        observed.record = tail.keys.new_zeros(shape, dtype=torch.float32)
    missing = tail.length - observed.record.shape[2]
    if missing:
        observed.record = F.pad(observed.record, (0, 0, 0, missing))
    return observed.record


def recorded(
    scheduler: Scheduler, tokens: Span, queries: Tensor, seen: int, scale: float
) -> Tensor:
    """The records [R, H, T, c] of `tokens` after the newest `queries` [R, H, G, m, D].

    No matrix of all queries is held.
    """
    record, keys = tokens["record"], tokens["keys"]
    newest = tokens["positions"].to(keys.device).expand(record.shape[:3])
    if "valid" in tokens:
        newest = newest.masked_fill(~tokens["valid"].to(keys.device), seen)
    for weights, asked_at in attention_weights(queries, keys, newest, seen, scale):
        record = scheduler.recorded(record, weights, asked_at)
    return record
