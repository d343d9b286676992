"""Limits of a layer: the tokens that it may hold in its tail and in its pages."""

import itertools
import math

import torch

from ..routers import PageRouter
from ..storage.memory import storage_bytes
from .rerotation import rest_bytes
from .state import LayerState

# Bytes for each page of a KV head in a router's plan (number, tokens, first column, bias and masks),
# and in the selection that was read last.
PLAN_BYTES = 52


def is_over_budget(state: LayerState, seen: int) -> bool:
    """Return True if a row of `seen` tokens would exceed its budget if none had been evicted.

    All layers must agree, as their tails must be equal. A budget in bytes allows them different
    numbers of tokens: the result is then always True.
    """
    budget, scheduler = state.settings.budget, state.settings.scheduler
    if scheduler is None:
        return False
    if budget is not None and budget.bytes_in_force(state.num_generated) is not None:
        return True
    tokens = _tokens_held(state, seen, state.num_generated)
    return tokens is not None and seen > tokens


def tail_capacity(state: LayerState) -> int:
    """Return the maximum number of tokens in a tail between forward passes.

    A row of which only whole pages leave keeps up to a page beside its window, and gains a page
    before the next seal. Rows with padding behind their newest tokens may need more.
    """
    budget, settings = state.settings.budget, state.settings
    is_in_bytes = budget is not None and budget.bytes_in_force(state.num_generated) is not None
    return settings.window + (1 if is_in_bytes else 2) * settings.page_size


def row_window(state: LayerState, seen: int) -> int:
    """Return how many newest tokens a row keeps in its tail after `seen` tokens.

    If the budget is a share, the window is cut to fit into it; a default window is cut to half of
    it, so that the scheduler has a choice.
    """
    settings, generated = state.settings, state.num_generated
    if settings.budget is None or not isinstance(settings.budget.in_force(generated), float):
        return settings.window
    tokens = _tokens_held(state, seen, generated)
    assert tokens is not None, "a share is a number of tokens"
    max_window = tokens - 1 if settings.has_given_window else tokens // 2
    return max(min(settings.window, max_window, tokens - settings.num_sinks), 1)


def sealed_tokens(state: LayerState, seen: int, left: int) -> int | None:
    """Return how many tokens per KV head of a row may be in pages; None = all.

    The row has seen `seen` tokens, of which `left` have left the tail.
    """
    tokens = _tokens_held(state, seen, state.num_generated)
    scheduler, num_sinks = state.settings.scheduler, state.settings.num_sinks
    if tokens is None or scheduler is None:
        return None
    free = max(tokens - row_window(state, seen) - num_sinks, 0)
    return num_sinks + scheduler.layer_budget(
        free, max(left - num_sinks, 0), state.facts.paged_index, state.facts.num_paged
    )


def _tokens_held(state: LayerState, seen: int, generated: int) -> int | None:
    """Return how many tokens per KV head a row may hold, tail included; None = all."""
    budget, scheduler = state.settings.budget, state.settings.scheduler
    if budget is not None:
        return budget.tokens(seen, generated, lambda nbytes: _tokens_in(state, nbytes))
    return None if scheduler is None else scheduler.budget(seen)


def _tokens_in(state: LayerState, nbytes: int) -> int:
    """Return the tokens per row and KV head, tail included, that a cache of `nbytes` can hold."""
    settings = state.settings
    pages = int(_bytes_for_pages(state, nbytes) / _page_row_bytes(state))
    # Where heads differ in tokens or bytes, the last page of each head may not be full.
    pages -= _has_ragged_pages(state)
    return settings.window + max(pages, 0) * settings.page_size


def spare_bytes(state: LayerState) -> int:
    """Return the bytes of unused room that the pages of a layer may have.

    It is room for a quarter of the tokens seen, less two pages, for which the tail has room.
    """
    return max(state.num_seen // 4 - 2 * state.settings.page_size, 0) * state.tail.token_bytes


def page_bytes(state: LayerState) -> int | None:
    """Return the bytes that the pages of a layer may take; None if the budget is not in bytes."""
    budget = state.settings.budget
    nbytes = None if budget is None else budget.bytes_in_force(state.num_generated)
    return None if nbytes is None else _bytes_for_pages(state, nbytes)


def _bytes_for_pages(state: LayerState, nbytes: int) -> int:
    """Return the bytes that a cache of `nbytes` leaves to the pages of a layer.

    Raises:
        ValueError: the tail tokens and sinks of the layer take more than its share.
    """
    settings, tail = state.settings, state.tail
    elsewhere = state.neighbours.nbytes(state)
    share = max(nbytes - elsewhere, 0) // (state.facts.num_paged - state.neighbours.num_unpaged)
    opened = tail_capacity(state)
    owners, states = tail.batch * tail.keys.shape[1], (tail.keys, tail.values)
    fixed = opened * owners * sum(t.shape[3] * t.element_size() for t in states)
    fixed += opened * tail.batch * _label_bytes(state)
    fixed += state.observed.max_bytes(owners, opened, settings.page_size)
    others = (state.pages.codec.tensors(), state.scheduler_tensors(), state.probe.tensors())
    fixed += storage_bytes(itertools.chain(*others))
    copies = settings.placement.copies(state.facts.num_paged)
    fixed += 0 if copies is None else copies[1]
    sinks = math.ceil(settings.num_sinks / settings.page_size)
    min_bytes = fixed + (sinks + _has_ragged_pages(state) * (sinks > 0)) * _page_row_bytes(state)
    if share <= fixed or share < min_bytes:
        raise ValueError(
            f"`budget` is {nbytes} bytes, of which layers that are not paged and token ids take "
            f"{elsewhere}. That leaves {share} for layer {state.layer_idx}, but its tail tokens "
            f"and sinks alone take {math.ceil(min_bytes)} in this batch of {tail.batch}: give more, or a "
            "smaller `window`, `page_size` or batch."
        )
    return share - fixed


def _page_row_bytes(state: LayerState) -> float:
    """Return the bytes of one page for every KV head of every row."""
    tail = state.tail
    return tail.batch * tail.keys.shape[1] * state.settings.page_size * token_bytes(state)


def token_bytes(state: LayerState) -> float:
    """Return the bytes of a token of one KV head in a full page, its metadata included."""
    settings, tail = state.settings, state.tail
    dims, size = (tail.keys.shape[3], tail.values.shape[3]), tail.keys.element_size()
    total = state.compressor.bytes_per_token(*dims, size, settings.page_size)
    # Position; statistics, and their copy `counted`; labels; then constants.
    total += 4 + 4 * (state.observed.numbers + state.observed.width) + _label_bytes(state)
    constants = settings.needs.constants
    total += 0 if constants is None else 4 * constants.num_constants
    total += rest_bytes(state)
    # A ragged page stores its owner and its length.
    of_page = _has_ragged_pages(state) * 12 + _routing_bytes(state)
    return total + of_page / settings.page_size


def _routing_bytes(state: LayerState) -> int:
    """Return the bytes that a router needs for a page of a KV head."""
    router, size, tail = state.settings.router, state.settings.page_size, state.tail
    if not isinstance(router, PageRouter) or state.pages.digest is None:
        return 0
    labels = {} if tail.labels is None else tail.labels.tensors
    known = {k: t.new_zeros(1, 1, 1, size, t.shape[-1]) for k, t in labels.items()}
    known["positions"] = torch.zeros(1, 1, 1, size, dtype=torch.int32)
    digests = state.pages.digest(tail.keys.new_zeros(1, 1, 1, size, tail.keys.shape[3]), known)
    own = sum(tensor.nbytes for tensor in digests.values())
    is_full = torch.ones(1, 1, 1, dtype=torch.bool, device=tail.keys.device)
    prepared = sum(tensor.nbytes for tensor in router.prepared(digests, is_full).values()) - own
    if not _has_ragged_pages(state):
        return own + prepared + PLAN_BYTES
    # Their list has the digests once more, and they may have half the size.
    return 2 * (2 * own + prepared + PLAN_BYTES)


def _has_ragged_pages(state: LayerState) -> bool:
    """Return True if KV heads may differ in the number or the encoding of their pages."""
    return state.settings.traits.is_ragged or state.pages.codec.is_mixed


def _label_bytes(state: LayerState) -> int:
    """Return the bytes of a token's experts and their weights."""
    labels = state.tail.labels
    tensors = () if labels is None else labels.tensors.values()
    return sum(t[0, 0, 0].numel() * t.element_size() for t in tensors)
