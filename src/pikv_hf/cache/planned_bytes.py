"""The bytes that a cache will hold, computed from shapes before any weight is loaded."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..layer.allowance import sealed_tokens, token_bytes
from ..layer.departure import departure
from ..layer.paged_layer import PagedLayer, capacity
from ..layer.state import LayerState
from ..model.without_weights import trace, without_weights
from ..storage.memory import tensors_in
from ..storage.tiers import Near
from ..storage.token_table import TokenTable
from .pikv_cache import PiKVCache
from .token_log import log_bytes, num_kept_ids

# Tokens of the forward passes from which shapes are read; two show how other layers grow.
FEW, MANY = 128, 256


@dataclass(frozen=True)
class PlannedBytes:
    """Bytes on the devices after a prefill: of each cache layer by its index, and of token ids."""

    layers: dict[int, int]
    ids: int


def planned_bytes(
    model: PreTrainedModel, max_cache_len: int, batch_size: int = 1, **settings: Any
) -> PlannedBytes:
    """Compute the bytes of `PiKVCache(model, **settings)` after a prefill of `max_cache_len` tokens.

    Counted are tails with their room, encoded pages of the tokens within the budget (as
    `Compressor.bytes_per_token` says), positions, labels, statistics and digests, queries that
    methods keep, weights of methods, and layers that are not paged. A held prompt (`hold_prompt`)
    is counted whole. Not counted are pages in RAM or in files (`Offload`), room for pages of later
    tokens (up to 1/18 of the pages), and activations of the model.

    A copy of `model` without weights runs a short forward pass, whose keys, queries and labels have
    all shapes.

    Raises:
        TypeError, ValueError: a setting is invalid, or the forward pass does not run.
    """
    copied = without_weights(model)
    with _traced(copied, batch_size, FEW, settings) as cache:
        layers = dict(enumerate(cache.layers_to_be))
        others = {i: x for i, x in layers.items() if not isinstance(x, PagedLayer)}
        sizes = {}
        if others:
            with _traced(copied, batch_size, MANY, settings) as longer:
                pairs = {i: (x, longer.layers_to_be[i]) for i, x in others.items()}
                sizes = {i: _extrapolated(*pair, max_cache_len) for i, pair in pairs.items()}
        ids = log_bytes(batch_size, max_cache_len, num_kept_ids(cache.settings))
        paged = {s.layer_idx: _paged_bytes(s, max_cache_len) for s in cache.states}
        budget = cache.settings.budget
        limit = None if budget is None else budget.bytes_in_force(0)
        if limit is not None:
            paged = _within(limit, ids + sum(sizes.values()), paged)
    return PlannedBytes(dict(sorted((sizes | paged).items())), ids)


def _traced(model: PreTrainedModel, batch: int, tokens: int, settings: dict[str, Any]) -> PiKVCache:
    """Return a cache of `model` that holds `tokens` tokens of each row, none of them sealed."""
    cache = PiKVCache(model, **settings)
    cache.reading.begin_block()
    try:
        trace(model, cache, batch, tokens)
    except BaseException:
        cache.detach()
        raise
    cache.reading.release()
    return cache


def _paged_bytes(state: LayerState, seen: int) -> int:
    """Return the bytes of a paged layer after `seen` tokens like the tokens in its tail."""
    observed, traced, rows = state.observed, state.tail.length, state.tail.batch
    queries, record = observed.queries, observed.record
    _lengthen(state, seen)
    is_whole = state.unpaged_reason is not None or state.settings.holds_prompts
    departed = 0 if is_whole else departure(state).lengths[0]
    opened = seen - departed
    room = seen if is_whole else min(capacity(state, opened), opened + state.settings.page_size)
    total = room * state.tail.token_bytes + opened * rows * _label_bytes(state)
    if queries is not None:
        total += queries.nbytes * min(observed.max_queries, seen) // queries.shape[3]
    if record is not None:
        total += record.nbytes * opened // traced
    others = (*state.pages.codec.tensors(), *state.scheduler_tensors(), *state.probe.tensors())
    total += sum(tensor.nbytes for tensor in others)
    return total + _page_bytes(state, _tokens_in_pages(state, seen, departed))


def _within(limit: int, elsewhere: int, paged: dict[int, int]) -> dict[int, int]:
    """Return the bytes of `paged` layers, reduced equally if they exceed what `limit` leaves.

    A layer cannot see the bytes `elsewhere`, of layers that are not paged and of token ids, exactly
    on the meta device.
    """
    excess = max(sum(paged.values()) + elsewhere - limit, 0)
    less = -(-excess // max(len(paged), 1))
    if excess and less >= min(paged.values(), default=0):
        raise ValueError(
            f"`budget` is {limit} bytes, of which layers that are not paged and token ids take "
            f"{elsewhere}: give more."
        )
    return {layer: nbytes - less for layer, nbytes in paged.items()}


def _tokens_in_pages(state: LayerState, seen: int, departed: int) -> int:
    """Return how many of the `departed` tokens of a row its pages hold: the mean of the KV heads."""
    scheduler, tokens = state.settings.scheduler, sealed_tokens(state, seen, departed)
    if scheduler is None or tokens is None:
        return departed
    if not state.settings.traits.has_lengths:
        return min(tokens, departed)
    lengths = scheduler.lengths(state.layer_idx, departed, tokens)
    return math.ceil(lengths.clamp_max(departed).double().mean())


def _lengthen(state: LayerState, seen: int) -> None:
    """Lengthen the tail, on the meta device, to `seen` tokens of the prompt."""
    keys, values, labels = state.tail.keys, state.tail.values, state.tail.labels
    added = seen - state.tail.length
    state.open(_longer(keys, seen), _longer(values, seen), state.latent_rank)
    if labels is not None:
        state.tail.label(TokenTable({k: _longer(t, seen) for k, t in labels.tensors.items()}))
    state.note_update(added)


def _longer(states: Tensor, tokens: int) -> Tensor:
    """Return a tensor like `states` [B, H, T, D] for `tokens` tokens."""
    return states.new_empty(*states.shape[:2], tokens, states.shape[3])


def _page_bytes(state: LayerState, tokens: int) -> int:
    """Return the bytes on the device of the pages of `tokens` tokens of each row and KV head."""
    keys, values, size = state.tail.keys, state.tail.values, state.settings.page_size
    owners, pages = keys.shape[0] * keys.shape[1], math.ceil(tokens / size)
    tokens = pages * math.ceil(tokens / max(pages, 1))  # pages are made smaller, not left unfilled
    of_token, label = token_bytes(state), _label_bytes(state)
    total = tokens * owners * of_token
    if state.settings.scheduler is None:
        # All heads hold the same tokens, and all rows the same positions, which are stored once.
        total -= tokens * (owners * (4 + label) - 4 - keys.shape[0] * label)
    dims = keys.shape[3], values.shape[3], keys.element_size(), size
    encoded = tokens * owners * state.compressor.bytes_per_token(*dims)
    copies = state.settings.placement.copies(state.facts.num_paged)
    near = [
        tier.limit for tier in state.pages.places.tiers(0, keys.device) if tier.name == Near.name
    ]
    limit = math.inf if None in near else sum(limit or 0 for limit in near)
    far = max(encoded - limit, 0)
    return round(total - far + min(far, 0 if copies is None else copies[1]))


def _label_bytes(state: LayerState) -> int:
    """Return the bytes of the experts of a token, and of their weights."""
    labels = state.tail.labels
    return 0 if labels is None else sum(t[0, 0, 0].nbytes for t in labels.tensors.values())


def _extrapolated(short: Any, long: Any, seen: int) -> int:
    """Return the bytes at `seen` tokens of a layer that is not paged, from two of its states."""
    few, many, end = FEW, MANY, seen
    if getattr(short, "is_sliding", False):
        few, many, end = (min(count, short.sliding_window - 1) for count in (FEW, MANY, seen))
    least, most = (sum(t.nbytes for t in tensors_in(vars(layer))) for layer in (short, long))
    return round(least + (0 if few == many else (most - least) / (many - few) * (end - few)))
