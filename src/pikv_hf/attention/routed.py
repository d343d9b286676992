"""Attention over the pages that a router selects.

Shapes: B batch rows, H KV heads, G query heads of each, q new tokens, R = G * q, M pages of all
stores, K of them selected, n readers of a store, D key dim, Dv value dim.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..layer.plan import Candidates, Plan
from ..layer.planning import planned, resident_for
from ..layer.state import LayerState
from ..routers import PageRouter, Query
from ..storage.row_map import PageStore, Partial
from ..storage.selected import Selection
from ..storage.token_table import TokenTable


def selecting_router(state: LayerState, length: int, seen: int | None = None) -> PageRouter | None:
    """Return the router if it selects pages for `length` new tokens; a prompt reads all pages.

    `seen`: number of tokens before them; None = they are the newest tokens of the layer.
    """
    router = state.settings.router
    if not isinstance(router, PageRouter) or not state.pages.slabs:
        return None
    is_draft = state.is_drafting and state.reading.prompt_length is None
    seen = state.num_seen - length if seen is None else seen
    if state.reading.is_prompt(seen, length) and not is_draft:
        return None
    return router


def selected(
    state: LayerState, router: PageRouter, query: Tensor, length: int, scale: float
) -> list[Selection] | None:
    """Return the pages that `query` [B, H, R, D] reads of each store; None = all of all stores."""
    plan = planned(state, router)
    if plan.reads_all and not router.has_state:
        return None
    states = query[:, :, :, None] if length == 1 else query.unflatten(2, (-1, length))
    asked = _query(state, router, plan, states, scale)
    if plan.reads_all:
        everything = (plan.bias[:, :, 0] != -torch.inf).float()
        state.routing.set_state(_updated(router, plan, asked, everything, None))
        return None
    index, is_read = _selected(router, plan, asked)
    resident, missing, fetched = resident_for(state, plan, length, index.shape[3]), None, None
    if resident is None:
        each = (_selection(plan, candidates, index, is_read) for candidates in plan.candidates)
        selections = [selection for selection in each if selection is not None]
    else:
        is_read_once = None if is_read is None else is_read[:, :, 0]
        selections = [resident.selection(plan, index[:, :, 0], is_read_once)]
        missing, fetched = resident.missing, resident.fetched
    if router.has_state:
        counts = _counted(plan, index, is_read)
        misses = None if missing is None else _counted(plan, index, missing[:, :, None])
        state.routing.set_state(_updated(router, plan, asked, counts, misses))
    state.routing.note(selections, length, fetched)
    return selections


def attend_selection(
    selection: Selection, length: int, scale: float, covered: Tensor | None, query: Tensor
) -> Iterator[Partial]:
    """Yield partial results [B, H, R, ...] of `query` [B, H, R, D] over selected pages of a store.

    `covered` [B, R, columns] bool is True at columns that a query may not see; None = it sees all.
    """
    batch = query.shape[0]
    apart = query[:, :, None] if length == 1 else query.unflatten(2, (-1, length)).transpose(2, 3)
    store, hidden = selection.store, None
    if covered is not None:  # [B, R, c] to [n * q, G, c]
        hidden = _apart(store, covered.to(query.device).unflatten(1, (-1, length)))
    for out, lse in selection.attend(_apart(store, apart), scale, hidden):
        yield store.spread(_together(out, length), _together(lse, length), batch)


def _query(
    state: LayerState, router: PageRouter, plan: Plan, states: Tensor, scale: float
) -> Query:
    """Return the `states` [B, H, G, q, D] with what else a router may ask with."""
    length = states.shape[3]
    labels = _foretold(state, router.source, length) if router.needs_labels else None
    return Query(
        states=states,
        scale=scale,
        positions=functools.partial(_positions, state, states),
        layer_idx=state.layer_idx,
        max_pages=plan.slots,
        limits=plan.limits,
        experts=None if labels is None else labels["experts"][:, 0],
        weights=None if labels is None else labels["weights"][:, 0],
        state=state.routing.state,
    )


def _foretold(state: LayerState, source: str, length: int) -> TokenTable | None:
    """Return labels [B, 1, length, k] that foretell the experts of the newest `length` tokens.

    `source` is "early_gate", the choice of the layer's gate before attention; "previous_layer", the
    choice of the nearest earlier gate for the tokens; or "previous_token", the labels of the token
    before them, which also serve where there is no earlier gate. None = there are none.

    Raises:
        RuntimeError: the early gate of a layer with a gate did not run.
    """
    index, tail = state.facts.paged_index, state.tail
    if source == "early_gate" and state.facts.has_gate:
        return state.step.foretold(index, state.layer_idx)
    labels = None
    if source == "previous_layer":
        labels = state.step.labels_before(index, tail.keys.device)
    if labels is not None or tail.labels is None or not len(tail.labels):
        return labels
    newest = tail.labels.narrow(len(tail.labels) - 1, 1)
    return TokenTable({k: t.expand(-1, -1, length, -1) for k, t in newest.tensors.items()})


def _positions(state: LayerState, states: Tensor) -> Tensor:
    """Return the positions [B or 1, q] of the newest tokens, of `states` [B, H, G, q, D]."""
    end = state.num_seen
    columns = torch.arange(end - states.shape[3], end, device=states.device)[None]
    return state.columns.numbered(list(range(len(states))), columns)


def _selected(router: PageRouter, plan: Plan, query: Query) -> tuple[Tensor, Tensor | None]:
    """Return which pages are selected, and which of them are read; None = all.

    They are indices [B, H, q, K] among the pages of all stores.
    """
    batch, heads = query.states.shape[:2]
    scores = [router.scores(query, c.pages) for c in plan.candidates]
    if len(scores) > 1:
        scores = [each.expand(batch, heads, *each.shape[2:]) for each in scores]
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    if plan.others is not None:
        joined = torch.where(plan.others[:, :, None], -torch.inf, joined)
    of_heads = router.over_group(joined)
    biased = torch.where(plan.is_free, of_heads, plan.bias)
    if router.has_ties:  # the newest of equal pages first
        by_age = None if plan.by_age is None else plan.by_age.expand_as(biased)
        aged = biased if by_age is None else biased.gather(3, by_age)
        order = aged.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        index = biased.shape[-1] - 1 - order[..., : plan.slots]
        index = index if by_age is None else by_age.gather(3, index)
    else:
        index = biased.topk(plan.slots, dim=-1).indices
    if router.top_p is None:
        if plan.limits is None:
            return index, None
        place = torch.arange(plan.slots, device=index.device)
        return index, place < plan.limits[:, :, None, None]
    mass = router.logits(of_heads, query.scale).softmax(-1).expand(biased.shape).gather(3, index)
    chosen = biased.gather(3, index)
    is_read = (mass.cumsum(-1) - mass < router.top_p) | (chosen == torch.inf)
    is_read &= chosen != -torch.inf
    needed = int(is_read.sum(-1).max())  # waits for the device
    return index[..., :needed], is_read[..., :needed]


def _counted(plan: Plan, index: Tensor, is_read: Tensor | None) -> Tensor:
    """Count the queries that read each page, [B, H, M], for selected pages `index` [B, H, q, K]."""
    ones = torch.ones_like(index, dtype=torch.float32)
    counts = ones if is_read is None else ones * is_read
    return torch.zeros_like(plan.bias[:, :, 0]).scatter_add_(2, index.flatten(2), counts.flatten(2))


def _updated(
    router: PageRouter, plan: Plan, query: Query, counts: Tensor, misses: Tensor | None
) -> Tensor | None:
    """Return the state of the router after pages were read by `counts` [B, H, M] queries each.

    `misses` [B, H, M] counts those that fetched the page; None = all those of far stores.
    """
    if misses is None:
        misses = counts.clone()
        for candidates in plan.candidates:
            if not candidates.store.tier.is_far:
                misses.narrow(2, candidates.start, candidates.count).zero_()
    if plan.others is not None:
        counts, misses = (t.masked_fill(plan.others[:, :, 0], 0) for t in (counts, misses))
    read = [
        (c.pages, counts.narrow(2, c.start, c.count), misses.narrow(2, c.start, c.count))
        for c in plan.candidates
    ]
    return router.updated(query, read)


def _selection(
    plan: Plan, candidates: Candidates, index: Tensor, is_read: Tensor | None
) -> Selection | None:
    """Return the selected pages of one store, for n * q queries apart; None = there are none."""
    length, pages = index.shape[2], index
    if len(plan.candidates) > 1:
        pages = index - candidates.start
        inside = (pages >= 0) & (pages < candidates.count)
        inside = inside if is_read is None else inside & is_read
        width = min(index.shape[3], candidates.count)
        if index.device.type == "cpu":
            width = min(width, int(inside.sum(-1).max()))
        if not width:
            return None
        order = inside.int().argsort(dim=-1, descending=True, stable=True)[..., :width]
        pages = pages.gather(3, order).clamp(0, candidates.count - 1)
        is_read = inside.gather(3, order)
        if index.device.type == "cpu" and bool(is_read.all()):
            is_read = None
    store, tokens = candidates.store, None
    if is_read is not None or candidates.has_partial:
        held = candidates.tokens.expand(*pages.shape[:2], -1).gather(2, pages.flatten(2))
        held = held.view(pages.shape)
        tokens = _apart(store, held if is_read is None else held * is_read)
    rows = None
    if length > 1 or not (store.is_in_order() and store.is_read_by_all(len(pages))):
        rows = store.index("stored", pages.device).repeat_interleave(length)
    return Selection(store, rows, _apart(store, pages), tokens)


def _apart(store: PageStore, each: Tensor) -> Tensor:
    """Return the entries [n * q, H, ...] of the n readers of a store, of `each` [B, H, q, ...]."""
    if not store.is_read_by_all(each.shape[0]):
        each = each.index_select(0, store.index("readers", each.device))
    return each[:, :, 0] if each.shape[2] == 1 else each.transpose(1, 2).flatten(0, 1)


def _together(each: Tensor, length: int) -> Tensor:
    """Return [n, H, G * q, ...] of `each` [n * q, H, G, ...], for q = `length` new tokens."""
    if length == 1:
        return each
    return each.unflatten(0, (-1, length)).movedim(1, 3).flatten(2, 3)
