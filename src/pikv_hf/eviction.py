"""What stays within the budget, of the tokens that leave the tail and of the sealed ones."""

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .allowance import page_bytes, row_window, sealed_tokens, spare_bytes, token_bytes
from .checks import naming
from .counting import write_counted
from .model.linear import output_weight
from .moving import moves, side_by_side, with_rest
from .records import settled, with_record
from .room import Room
from .schedulers import Scheduler, Tokens
from .span import Span

if TYPE_CHECKING:
    from .layer import PagedLayer

# The budget is this many times what goes of it at once, if that is not said.
INTERVALS = 16


def kept(
    layer: "PagedLayer",
    rows: list[int],
    new: Span,
    count: int,
    scheduler: Scheduler,
    mask: Tensor | None,
) -> tuple[Span, Room]:
    """What of `new`, tokens of `rows`, is to be sealed: with the sealed tokens, if some must go.

    Besides, what is known of the tokens that follow until some must go again.
    `count` tokens at the beginning of the tail are leaving it; `mask` is the newest of the model.
    """
    if moves(scheduler):
        new = with_rest(layer, new)
    if layer.observed.is_marked:
        new = with_record(layer, rows, new)
    if scheduler.constants:
        once = _tokens(layer, rows, new, count, scheduler, scheduler.constant_needs)
        with torch.no_grad():
            new = new.joined(Span({"constant": scheduler.constant(once)}))
    left = layer.left[rows[0]]
    seen = left + layer.tail.length - count
    budget = sealed_tokens(layer, seen, left)
    room = _room(layer, rows, len(new))
    is_within = budget is None or _fits(layer, rows[0], len(new), budget, scheduler)
    is_within &= room.nbytes >= 0
    if is_within and not scheduler.records:
        return new, room
    if is_within and len(rows) == layer.tail.batch and write_counted(layer):
        return with_record(layer, rows, new), room
    span = _candidates(layer, rows, new, scheduler, mask)
    if is_within or budget is None:
        return span.front(), room
    tokens = _tokens(layer, rows, span, count, scheduler, scheduler.needs)
    to_follow = _to_follow(layer, seen, budget)
    keep = scheduler.keep(tokens, budget - to_follow)
    if scheduler.controls:
        layer.observed.set_control(rows, scheduler.controlled(tokens, keep))
    if span.codes():
        span = span.without("keys", "values")  # the codes stay what they are
    is_ragged = scheduler.is_ragged and bool((keep < 0).any())
    if scheduler.is_ragged:
        span = span.without("valid")
    stays = span.gather(keep.clamp_min(0) if is_ragged else keep)
    if is_ragged:
        stays = stays.joined(Span({"valid": keep >= 0}))
    if moves(scheduler):
        stays = side_by_side(layer, stays, keep, len(span))
    return stays, Room(room.nbytes, to_follow)


def _room(layer: "PagedLayer", rows: list[int], new: int) -> Room:
    """The bytes of room for more when `new` tokens of `rows` are sealed; < 0 = too many are sealed."""
    limit, spare = page_bytes(layer), spare_bytes(layer)
    if limit is None:
        return Room(nbytes=spare)
    pages, owners = math.ceil(new / layer.shared.page_size), len(rows) * layer.tail.keys.shape[1]
    added = math.ceil(pages * owners * layer.shared.page_size * token_bytes(layer))
    return Room(nbytes=min(limit - layer.pages.bytes_with(added), spare))


def _candidates(
    layer: "PagedLayer", rows: list[int], new: Span, scheduler: Scheduler, mask: Tensor | None
) -> Span:
    """The sealed tokens of `rows`, which leave their pages, and `new` behind them."""
    pages = layer.pages
    take = functools.partial(pages.take, rows, with_values="values" in scheduler.needs)
    is_small = len(new) <= pages.page_size and pages.held(rows[0]) is not None
    if is_small and pages.compressor.is_lossless and not scheduler.records:
        # Pages mostly have room: then nothing is copied to stand in one piece.
        with naming(layer):
            pages.append(new, rows, layer.tail.batch)
        span = take()
        assert span is not None
        return span
    sealed = take()
    if scheduler.records:
        sealed = settled(layer, rows, sealed, mask)
        new = with_record(layer, rows, new)
    if sealed is not None and not moves(scheduler):
        with naming(layer):
            new = pages.encoded(new)
    return new if sealed is None else sealed.then(new)


def _fits(layer: "PagedLayer", row: int, new: int, budget: int, scheduler: Scheduler) -> bool:
    """Whether `new` tokens more of each KV head are within the budget."""
    held = layer.pages.held(row)
    held = torch.zeros(1) if held is None else held.double()
    if scheduler.has_lengths:
        most = scheduler.lengths(layer.layer_idx, layer.left[row], budget)
        return bool((held + new <= most).all())
    return math.ceil(held.mean()) + new <= budget


def _to_follow(layer: "PagedLayer", seen: int, budget: int) -> int:
    """How many tokens less than the `budget` of pages stay, so that others are not due at once.

    0 while a prompt is read, which is to keep what it may.
    """
    if not layer.generated:
        return 0
    page_size, interval = layer.shared.page_size, layer.shared.interval
    pages = math.ceil(interval / page_size) if interval else 0
    pages = pages or (budget + row_window(layer, seen)) // (INTERVALS * page_size)
    # A page is about to be sealed: the others are to follow.
    least = max(layer.shared.least, budget // 2)
    return max(min((pages - 1) * page_size, budget - least), 0)


def _tokens(
    layer: "PagedLayer",
    rows: list[int],
    span: Span,
    count: int,
    scheduler: Scheduler,
    needs: frozenset[str],
) -> Tokens:
    """`span` and what else of the layer the scheduler asks for, `needs` among it."""
    index = torch.tensor(rows)
    keys, values = layer.tail.view()
    opened = Span({"keys": keys, "values": values})
    if layer.tail.labels is not None:
        opened = opened.joined(layer.tail.labels)
    opened = opened.narrow(count, len(opened) - count).rows(index)
    labels: dict[str, Any] = {}
    if "experts" in needs and "experts" in span:
        labels = {name: span[name] for name in ("experts", "weights")}
        labels |= {f"open_{name}": opened[name] for name in ("experts", "weights")}
    module = layer.shared.modules.get(layer.layer_idx)
    shape = span["keys"].shape[:3]
    return Tokens(
        positions=span["positions"].to(span["keys"].device).long().expand(shape),
        keys=span["keys"],
        values=span["values"] if "values" in needs else None,
        open_keys=opened["keys"],
        open_values=opened["values"] if "values" in needs else None,
        latent_rank=layer.latent_rank,
        seen=layer.seen,
        layer_idx=layer.layer_idx,
        queries=layer.observed.of_rows(rows, scheduler.observed_queries),
        scale=layer.scale,
        record=span.tensors.get("record"),
        constant=span.tensors.get("constant"),
        control=layer.observed.control_of(rows, layer.tail.keys) if scheduler.controls else None,
        valid=span["valid"].expand(shape) if "valid" in span else None,
        sinks=layer.shared.sinks,
        padding=layer.seen - layer.left[rows[0]] - (layer.tail.length - count),
        output=output_weight(module, layer.tail.keys) if "output" in needs else None,
        module=module if "module" in needs else None,
        rotary=layer.shared.rotaries.get(layer.layer_idx),
        notes=layer.shared.notes(rows),
        **labels,
    )
