"""The choice, within the budget, among sealed tokens and tokens that leave the tail."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..model.output_projection import output_weight
from ..schedulers import Candidates, Scheduler
from ..storage.room import Room
from ..storage.token_table import TokenTable, rows_together
from .allowance import page_bytes, row_window, sealed_tokens, spare_bytes, token_bytes
from .checks import naming
from .departure import Departing
from .records import settled, with_record, write_counted
from .rerotation import moves, side_by_side, with_rest
from .state import LayerState

# By default an eviction frees 1/16 of the budget.
INTERVALS = 16
# Rows are stored together if their tokens fill at least this share of the store. Attention reads as
# many places in every row as the longest row has.
MIN_FILLED = 0.75


class Plan(NamedTuple):
    """The `new` tokens of a group that leave the tail, and whether some must be evicted.

    The group may hold `budget` tokens in pages; None = any number. If not `is_within`, some tokens
    must be evicted.
    """

    group: Departing
    new: TokenTable
    budget: int | None
    room: Room
    is_within: bool


class Selection(NamedTuple):
    """Tokens of `rows` to seal, the first `lengths[r]` of row r (None = all), and `room` for more.

    Each row has seen at least `seen` tokens.
    """

    rows: list[int]
    span: TokenTable
    room: Room
    seen: int
    lengths: list[int] | None = None


def select_tokens(
    state: LayerState, tail: TokenTable, groups: list[Departing], scheduler: Scheduler
) -> Iterator[Selection]:
    """Yield the tokens to seal of `groups`; each selection must be sealed before the next.

    These are the tokens that leave the `tail`. If the scheduler must evict or update statistics,
    sealed tokens leave their pages, and the kept ones are returned, too. The room lasts until the
    next eviction.
    """
    plans = (_plan(state, tail, group, scheduler) for group in groups)
    if len(groups) > 1 and _seals_together(state):
        yield from _selected_together(state, tail, list(plans), scheduler)
        return
    for plan in plans:
        rows, seen = plan.group.rows, plan.group.seen
        if plan.is_within and state.settings.needs.statistics is None:
            yield Selection(rows, plan.new, plan.room, seen)
        elif plan.is_within and len(rows) == state.tail.batch and write_counted(state):
            yield Selection(rows, with_record(state, plan.group, plan.new), plan.room, seen)
        else:
            span = _candidates(state, plan)
            yield Selection(rows, *_kept(state, tail, plan, span, scheduler), seen)


def _seals_together(state: LayerState) -> bool:
    """Return True if all rows may be sealed into one store, from which codes come back unchanged.

    Where bytes are limited, of the layer or of a tier, rows are sealed one after another.
    """
    codec = state.pages.codec
    is_limited = state.pages.is_limited(state.tail.keys.device)
    is_exact = (codec.is_lossless or codec.is_per_token) and not codec.is_mixed
    is_plain = not is_limited and page_bytes(state) is None and not moves(state.settings)
    return is_exact and is_plain and not codec.observed_queries


def _selected_together(
    state: LayerState, tail: TokenTable, plans: list[Plan], scheduler: Scheduler
) -> Iterator[Selection]:
    """Select the tokens of all rows, so that they lie in one store if they are about equally many.

    If any row must evict, the tokens of all rows leave their pages.
    """
    needs, groups = state.settings.needs, [plan.group.rows for plan in plans]
    if all(plan.is_within for plan in plans) and needs.statistics is None:
        kept = [(plan.new, plan.room) for plan in plans]
    else:
        taken = state.pages.take(groups, with_values="values" in needs.inputs)
        encodes = any(sealed is not None for sealed in taken)
        pairs = zip(plans, taken, strict=True)
        spans = [_behind(state, plan, sealed, encodes=encodes) for plan, sealed in pairs]
        kept = [
            _kept(state, tail, plan, span, scheduler)
            for plan, span in zip(plans, spans, strict=True)
        ]
    seen = [plan.group.seen for plan in plans]
    lengths = [len(span) for span, _ in kept]
    held = sum(n * len(rows) for n, rows in zip(lengths, groups, strict=True))
    if held < MIN_FILLED * max(lengths) * state.tail.batch:
        for rows, (span, room), count in zip(groups, kept, seen, strict=True):
            if len(span):
                yield Selection(rows, span, room, count)
        return
    room = max((room for _, room in kept), key=lambda room: room.tokens or 0)
    span = rows_together([span for span, _ in kept], groups)
    length_of = {row: n for n, rows in zip(lengths, groups, strict=True) for row in rows}
    rows = sorted(length_of)
    per_row = None if "valid" in span else [length_of[row] for row in rows]
    yield Selection(rows, span, room, min(seen), per_row)


def _plan(state: LayerState, tail: TokenTable, group: Departing, scheduler: Scheduler) -> Plan:
    """Return what is to be sealed of a `group` that leaves the `tail`."""
    new = group.leaving(tail)
    if moves(state.settings):
        new = with_rest(state, new)
    if state.observed.is_marked:
        new = with_record(state, group, new)
    constants = state.settings.needs.constants
    if constants is not None:
        once = _candidates_of(state, tail, group, new, constants.constant_inputs)
        with torch.no_grad():
            new = new.with_columns(TokenTable({"constant": constants.constants(once)}))
    budget = sealed_tokens(state, group.seen, group.left)
    room = _room(state, group.rows, len(new))
    is_within = budget is None or _is_within_budget(state, group, budget, scheduler)
    return Plan(group, new, budget, room, is_within and room.nbytes >= 0)


def _kept(
    state: LayerState, tail: TokenTable, plan: Plan, span: TokenTable, scheduler: Scheduler
) -> tuple[TokenTable, Room]:
    """Return the tokens of `span` that the budget retains, and the room to make for later tokens.

    `span` has all tokens of a group that have left the tail.
    """
    needs, group = state.settings.needs, plan.group
    if plan.is_within or plan.budget is None:
        span = span.valid_first()
        return span.without("keys", "values") if span.codes() else span, plan.room
    tokens = _candidates_of(state, tail, group, span, needs.inputs)
    headroom = _headroom(state, group.seen, plan.budget)
    keep = scheduler.keep(tokens, plan.budget - headroom)
    if needs.row_state is not None:
        state.observed.set_control(group.rows, needs.row_state.next_row_state(tokens, keep))
    if span.codes():
        span = span.without("keys", "values")  # codes are copied without decoding
    is_ragged = state.settings.traits.is_ragged and bool((keep < 0).any())
    if state.settings.traits.is_ragged:
        span = span.without("valid")
    retained = span.gather(keep.clamp_min(0) if is_ragged else keep)
    if is_ragged:
        retained = retained.with_columns(TokenTable({"valid": keep >= 0}))
    if moves(state.settings):
        retained = side_by_side(state, retained, keep, len(span))
    return retained, Room(plan.room.nbytes, headroom)


def _room(state: LayerState, rows: list[int], new: int) -> Room:
    """Return the room left once `new` tokens of each of `rows` are sealed; < 0 bytes = too many."""
    limit, spare = page_bytes(state), spare_bytes(state)
    if limit is None:
        return Room(nbytes=spare)
    pages, owners = math.ceil(new / state.settings.page_size), len(rows) * state.tail.keys.shape[1]
    added = math.ceil(pages * owners * state.settings.page_size * token_bytes(state))
    return Room(nbytes=min(limit - state.pages.bytes_with(added), spare))


def _candidates(state: LayerState, plan: Plan) -> TokenTable:
    """Take the sealed tokens of a group out of their pages, and put its new tokens behind them."""
    pages, needs, rows = state.pages, state.settings.needs, plan.group.rows
    take = functools.partial(pages.take, [rows], with_values="values" in needs.inputs)
    is_small = len(plan.new) <= pages.page_size and pages.held(rows[0]) is not None
    if is_small and pages.codec.is_lossless and needs.statistics is None:
        # Pages mostly have room: old and new tokens are then in one piece without a copy.
        with naming(state):
            pages.append(plan.new, rows, state.tail.batch)
        (span,) = take()
        assert span is not None
        return span
    (sealed,) = take()
    return _behind(state, plan, sealed, encodes=sealed is not None)


def _behind(
    state: LayerState, plan: Plan, sealed: TokenTable | None, *, encodes: bool
) -> TokenTable:
    """Return the tokens of a group: `sealed`, out of their pages, and behind them its new tokens.

    If it `encodes`, new tokens have codes, too, unless the compressor encodes whole pages only.
    """
    rows, new = plan.group.rows, plan.new
    if state.settings.needs.statistics is not None:
        sealed = settled(state, rows, sealed)
        new = with_record(state, plan.group, new)
    if sealed is not None and not plan.group.count:
        return sealed.for_rows(len(rows))  # several rows may have read one stored row
    if encodes and not moves(state.settings):
        with naming(state):
            new = state.pages.encoded(new)
    return new if sealed is None else sealed.followed_by(new)


def _is_within_budget(
    state: LayerState, group: Departing, budget: int, scheduler: Scheduler
) -> bool:
    """Return True if sealed tokens and tokens that leave the tail need no eviction.

    KV heads may hold `budget` tokens on average, or their `lengths` if the scheduler has any.
    """
    held = state.pages.held(group.rows[0])
    held = torch.zeros(1) if held is None else held.double()
    if state.settings.traits.has_lengths:
        max_lengths = scheduler.lengths(state.layer_idx, group.left, budget)
        return bool((held + group.count <= max_lengths).all())
    return math.ceil(held.mean()) + group.count <= budget


def _headroom(state: LayerState, seen: int, budget: int) -> int:
    """Return how many tokens per KV head an eviction leaves free for the next `interval` tokens.

    Before the first generated token this is 0: the prompt may use its whole `budget`.
    """
    if not state.num_generated:
        return 0
    page_size, interval = state.settings.page_size, state.settings.interval
    pages = math.ceil(interval / page_size) if interval else 0
    pages = pages or (budget + row_window(state, seen)) // (INTERVALS * page_size)
    # The first of these pages is being sealed now.
    min_kept = max(state.settings.num_sinks, budget // 2)
    return max(min((pages - 1) * page_size, budget - min_kept), 0)


def _candidates_of(
    state: LayerState,
    tail: TokenTable,
    group: Departing,
    span: TokenTable,
    inputs: frozenset[str],
) -> Candidates:
    """Return `span` as candidates, with `inputs` and all other needs of the scheduler."""
    rows, needs, opened = group.rows, state.settings.needs, group.staying(tail)
    labels: dict[str, Any] = {}
    if "experts" in inputs and "experts" in span:
        labels = {name: span[name] for name in ("experts", "weights")}
        labels |= {f"open_{name}": opened[name] for name in ("experts", "weights")}
    module = state.module
    shape = span["keys"].shape[:3]
    positions = state.columns.numbered(rows, span["positions"].to(span["keys"].device).long())
    queries = state.observed.of_rows(rows, min(needs.queries, group.seen))
    return Candidates(
        positions=positions.expand(shape),
        keys=span["keys"],
        values=span["values"] if "values" in inputs else None,
        open_keys=opened["keys"],
        open_values=opened["values"] if "values" in inputs else None,
        latent_rank=state.latent_rank,
        seen=group.seen,
        layer_idx=state.layer_idx,
        queries=queries,
        scale=state.scale,
        statistics=span.tensors.get("record"),
        constants=span.tensors.get("constant"),
        row_state=state.observed.control_of(rows, state.tail.keys)
        if needs.row_state is not None
        else None,
        valid=span["valid"].expand(shape) if "valid" in span else None,
        sinks=state.settings.sinks,
        output=output_weight(module, state.tail.keys) if "output" in inputs else None,
        module=module if "module" in inputs else None,
        rotary=state.rotary,
        notes=state.step.notes(rows),
        **labels,
    )
