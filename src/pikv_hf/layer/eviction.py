"""The choice, within the budget, among sealed tokens and tokens that leave the tail."""

import functools
import math
from typing import Any

import torch

from ..model.output_projection import output_weight
from ..schedulers import Candidates, Scheduler
from ..storage.room import Room
from ..storage.token_table import TokenTable
from .allowance import page_bytes, row_window, sealed_tokens, spare_bytes, token_bytes
from .checks import naming
from .departure import Departing
from .records import settled, with_record, write_counted
from .rerotation import moves, side_by_side, with_rest
from .state import LayerState

# By default an eviction frees 1/16 of the budget.
INTERVALS = 16


def select_tokens(
    state: LayerState, tail: TokenTable, group: Departing, scheduler: Scheduler
) -> tuple[TokenTable, Room]:
    """Return the tokens of `group` to seal, and the room to make for later tokens.

    These are the tokens that leave the `tail`. If the scheduler must evict or update statistics,
    sealed tokens leave their pages, and the kept ones are returned, too. The room lasts until the
    next eviction.
    """
    rows, new = group.rows, group.leaving(tail)
    if moves(state.settings):
        new = with_rest(state, new)
    if state.observed.is_marked:
        new = with_record(state, group, new)
    needs = state.settings.needs
    if needs.constants is not None:
        once = _candidates_of(state, tail, group, new, needs.constants.constant_inputs)
        with torch.no_grad():
            new = new.with_columns(TokenTable({"constant": needs.constants.constants(once)}))
    budget = sealed_tokens(state, group.seen, group.left)
    room = _room(state, rows, len(new))
    is_within = budget is None or _is_within_budget(state, group, budget, scheduler)
    is_within &= room.nbytes >= 0
    if is_within and needs.statistics is None:
        return new, room
    if is_within and len(rows) == state.tail.batch and write_counted(state):
        return with_record(state, group, new), room
    span = _candidates(state, group, new)
    if is_within or budget is None:
        return span.valid_first(), room
    tokens = _candidates_of(state, tail, group, span, needs.inputs)
    headroom = _headroom(state, group.seen, budget)
    keep = scheduler.keep(tokens, budget - headroom)
    if needs.row_state is not None:
        state.observed.set_control(rows, needs.row_state.next_row_state(tokens, keep))
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
    return retained, Room(room.nbytes, headroom)


def _room(state: LayerState, rows: list[int], new: int) -> Room:
    """Return the room left once `new` tokens of each of `rows` are sealed; < 0 bytes = too many."""
    limit, spare = page_bytes(state), spare_bytes(state)
    if limit is None:
        return Room(nbytes=spare)
    pages, owners = math.ceil(new / state.settings.page_size), len(rows) * state.tail.keys.shape[1]
    added = math.ceil(pages * owners * state.settings.page_size * token_bytes(state))
    return Room(nbytes=min(limit - state.pages.bytes_with(added), spare))


def _candidates(state: LayerState, group: Departing, new: TokenTable) -> TokenTable:
    """Take the sealed tokens of a `group` out of their pages, and put `new` behind them."""
    pages, needs, rows = state.pages, state.settings.needs, group.rows
    take = functools.partial(pages.take, rows, with_values="values" in needs.inputs)
    is_small = len(new) <= pages.page_size and pages.held(rows[0]) is not None
    if is_small and pages.codec.is_lossless and needs.statistics is None:
        # Pages mostly have room for `new`: old and new tokens are then in one piece without a copy.
        with naming(state):
            pages.append(new, rows, state.tail.batch)
        span = take()
        assert span is not None
        return span
    sealed = take()
    if needs.statistics is not None:
        sealed = settled(state, rows, sealed)
        new = with_record(state, group, new)
    if sealed is not None and not group.count:
        return sealed.for_rows(len(rows))  # several rows may have read one stored row
    if sealed is not None and not moves(state.settings):
        with naming(state):
            new = pages.encoded(new)
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
