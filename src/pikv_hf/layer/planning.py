"""The plan of a layer's router: the pages to select from, and how many of them are read."""

import functools

import torch
from torch import Tensor

from ..routers import PageRouter, Pages
from ..storage.memory import on_device
from ..storage.page_list import PageList
from ..storage.ragged_pages import RaggedPages
from ..storage.row_map import PageStore
from ..storage.uniform_pages import UniformPages
from .plan import Candidates, Plan
from .resident import Resident
from .state import LayerState


def planned(state: LayerState, router: PageRouter) -> Plan:
    """Return the plan for the pages of the layer, made anew if they have changed."""
    lists = [store.page_list() for store in state.pages.slabs]
    return state.routing.plan_for(lists, lambda: _plan(state, router, lists))


def resident_for(state: LayerState, plan: Plan, length: int, count: int) -> Resident | None:
    """Return the copies on the device through which `count` pages of each KV head are read.

    None = they are read directly.
    """
    copies = state.settings.placement.copies(state.facts.num_paged)
    if copies is None:
        return None
    stores = [candidates.store for candidates in plan.candidates]
    batch, heads = state.tail.batch, state.tail.keys.shape[1]
    uniform = [store for store in stores if isinstance(store, UniformPages)]
    are_alike = (
        length == 1
        and len(uniform) == len(stores)
        and all(
            store.is_even
            and store.page_size == state.settings.page_size
            and store.is_read_by_all(batch)
            for store in uniform
        )
    )
    if not are_alike or not any(store.tier.is_far for store in stores):
        return None
    residency, nbytes = copies
    pages = plan.bias.shape[-1]
    # Room for more pages than there are is made by doubling.
    slots = min(nbytes // (stores[0].page_bytes * batch * heads), 1 << (pages - 1).bit_length())
    if slots < count:
        return None
    resident = state.routing.resident
    if resident is None or resident.slots != slots:
        resident = Resident.like(uniform[0], residency, batch, slots)
        state.routing.set_resident(resident)
    return resident


def _plan(state: LayerState, router: PageRouter, lists: list[PageList]) -> Plan:
    if state.settings.scheduler is not None:
        state.routing.set_resident(None)  # eviction may have given pages other numbers
    batch, heads = state.tail.batch, state.tail.keys.shape[1]
    full = torch.zeros(batch, heads, dtype=torch.int64)
    partial = torch.zeros_like(full)
    candidates: list[Candidates] = []
    biases: list[Tensor] = []
    others: list[Tensor] = []
    num_sinks = max(state.settings.num_sinks, 1)
    start = 0
    for store, held in zip(state.pages.slabs, lists, strict=True):
        readers, stored = torch.tensor(store.readers), torch.tensor(store.stored)
        full.index_add_(0, readers, held.full[stored])
        partial.index_add_(0, readers, held.partial[stored])
        rows = None if _is_read_in_order(store, batch) else _rows(store, batch, held.first.device)
        first, tokens = _of_rows(held.first, rows), _of_rows(held.tokens, rows)
        digests = {name: _of_rows(t, rows) for name, t in held.digests.tensors.items()}
        position = state.columns.numbered(list(range(batch)), first).long()
        is_full = tokens == store.page_size
        pages = Pages(
            digests=router.prepared(digests, is_full),
            numbers=position // state.settings.page_size,
            keys=functools.partial(_keys, store, rows, heads, tokens.shape[2]),
        )
        is_always = (position < num_sinks) | ~is_full
        bias = torch.where(is_always, torch.inf, 0.0).masked_fill(tokens == 0, -torch.inf)
        if not store.is_read_by_all(batch):
            is_reader = torch.zeros(batch, dtype=torch.bool).index_fill(0, readers, True)
            bias = bias.masked_fill(~is_reader.to(bias.device)[:, None, None], -torch.inf)
        biases.append(bias.expand(batch, heads, -1))
        others.append((~is_full | (bias == -torch.inf)).expand(batch, heads, -1))
        has_partial = bool(held.partial.any())
        candidates.append(Candidates(store, rows, pages, tokens, has_partial, start))
        start += tokens.shape[2]
    size = min(store.page_size for store in state.pages.slabs)
    largest = max(state.pages.slabs, key=lambda store: store.nbytes)
    page_bytes = largest.page_bytes * heads * state.facts.num_paged
    wanted = router.counts(full, -(-num_sinks // size), page_bytes)
    counts = wanted + partial
    slots = int(counts.max())
    is_even = bool((counts == slots).all())
    bias, other = (torch.cat(parts, dim=-1)[:, :, None] for parts in (biases, others))
    by_age = None
    if router.has_ties and len(candidates) > 1:
        numbers = [c.pages.numbers.expand(batch, heads, -1) for c in candidates]
        by_age = torch.cat(numbers, dim=-1).argsort(dim=-1, stable=True)[:, :, None]
    is_sized = router.top_p in (None, 1)  # a part that rounds to 1 is not all
    return Plan(
        candidates=candidates,
        bias=bias,
        is_free=bias == 0,
        others=None if bool((full == start).all()) else other,
        slots=slots,
        limits=None if is_even else counts.to(biases[0].device),
        reads_all=is_sized and bool((wanted == full).all()),
        by_age=by_age,
    )


def _is_read_in_order(store: PageStore, batch: int) -> bool:
    return store.is_in_order() and store.is_read_by_all(batch)


def _rows(store: PageStore, batch: int, device: torch.device) -> Tensor:
    """Return the stored row [B] that each batch row reads; 0 for rows that read none."""
    stored_of = dict(zip(store.readers, store.stored, strict=True))
    return on_device(tuple(stored_of.get(row, 0) for row in range(batch)), device)


def _of_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return the entries of stored `rows` of [R or 1, ...]; None = all rows as they are."""
    return tensor if rows is None or tensor.shape[0] == 1 else tensor.index_select(0, rows)


def _keys(store: UniformPages | RaggedPages, rows: Tensor | None, heads: int, count: int) -> Tensor:
    """Decode the keys [n, H, m, P, D] of all pages of the stored `rows`; None = of all rows."""
    owners = store.rows if rows is None else len(rows)
    index = torch.arange(count, device=store.tier.device).expand(owners, heads, -1)
    return store.codec.decode_keys(store.tier.bring(store.pages_at(index, rows)))
