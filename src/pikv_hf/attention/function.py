"""The attention function that attached modules call, and attention over a paged layer.

Shapes: B batch rows, Hq query heads, H KV heads, G query heads per KV head, q new tokens, R = G * q
queries of a KV head, n tail tokens (new tokens included), D key dim, Dv value dim.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pikv_kernels import lowest_score, merge_partials, new_mask
from torch import Tensor, nn

from ..layer.autocast import without_autocast
from ..layer.handoff import SLOT, take_layer
from ..layer.paged_layer import PagedLayer
from ..layer.state import LayerState
from ..model.latent import LatentQuery
from ..model.versions import ALL_ATTENTION_FUNCTIONS, attention_implementation
from ..storage.codec import attend_states
from ..storage.memory import on_device
from ..storage.ragged_pages import RaggedPages
from ..storage.row_map import Partial
from ..storage.uniform_pages import UniformPages
from .places import Expand, attend_places
from .readable import SINKS, unpaged_reason
from .recording import attend_counting, counted_slabs
from .routed import attend_selection, selected, selecting_router

NAME = "pikv"


def pikv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention for transformers: `query` [B, Hq, q, D] to `[B, q, Hq, Dv]` and weights.

    Layers that are not paged, and the first tokens of a paged layer, which have no pages before
    them, use the model's own attention function, which may return weights; otherwise these are
    None. torch.compile traces calls that no `update` of a `PagedLayer` precedes.
    """
    if SLOT.layer is None:
        return _original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return _paged(module, query, key, value, attention_mask, scaling, kwargs)


@torch.compiler.disable
def _paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of the layer whose `update` ran last, and let the layer finish."""
    layer: PagedLayer = take_layer()
    state = layer.state
    if state.unpaged_reason is not None:
        result = _original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        _refuse_gradients(result[0])
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if state.is_first:
        state.judge(unpaged_reason(state, key, attention_mask, kwargs))
        result = _original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        sink = next((kwargs[name] for name in SINKS if kwargs.get(name) is not None), None)
        result = attend(state, module, query, attention_mask, scale, sink), None
        _refuse_gradients(result[0])
    visible = state.step.over_queries(attention_mask)
    layer.note_columns(visible, query.shape[2])
    if state.observed.limit and state.unpaged_reason is None:
        _observe(layer, module, query, scale)
    layer.finish()
    return result


def _refuse_gradients(out: Tensor) -> None:
    """Let a backward pass through `out` raise: it would miss the gradients of cached tokens."""
    if out.requires_grad:
        out.register_hook(_raise_on_backward)


def _raise_on_backward(gradient: Tensor) -> None:
    raise RuntimeError(
        "the backward pass needs a gradient for keys and values of earlier forward passes, but a "
        "PiKVCache holds them without one: train with the whole text in one forward pass."
    )


def _observe(layer: PagedLayer, module: nn.Module, query: Tensor, scale: float) -> None:
    """Hand the queries to the layer, in the space and dtype of its cached keys."""
    state = layer.state
    newest = query
    if state.columns.hidden is None:  # else its last columns may be padding
        newest = query[:, :, -state.observed.limit :]
    if state.latent_rank is not None:
        newest = LatentQuery(module, newest, state.latent_rank).absorb(newest)
    layer.observe(newest.to(state.tail.keys.dtype), scale)


def attend(
    state: LayerState,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    scale: float,
    sink: Tensor | None = None,
) -> Tensor:
    """Compute attention of the newest tokens over all pages and the tail: `[B, q, Hq, Dv]`.

    `query` [B, Hq, q, D]; `mask` as the model made it, whose last columns are the tail tokens;
    `sink` [Hq]: logits of a key without a value.
    """
    dtype, length = query.dtype, query.shape[2]
    expand: Expand | None = None
    if state.latent_rank is not None:
        latent = LatentQuery(module, query, state.latent_rank)
        query = latent.absorb(query)
        expand = functools.partial(_expanded, latent, query.shape[:3], dtype)
    # Ranks send values, which are smaller than latents.
    early = expand if state.pages.places.exchange is not None else None
    out = _attend(state, query.to(state.tail.keys.dtype), mask, scale, sink, early)
    out = out if early is not None or expand is None else expand(out)
    out = out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
    out = out.to(dtype, memory_format=torch.contiguous_format).flatten(2, 3)
    return out.contiguous()  # models may call `view` on it


def _expanded(
    latent: LatentQuery, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor
) -> Tensor:
    """Project outputs [B, 1, Hq * q, r + dr] over latents, of queries [B, Hq, q], to values."""
    return latent.expand(out.to(dtype).view(*shape, -1)).flatten(1, 2)[:, None]


@without_autocast
def _attend(
    state: LayerState,
    query: Tensor,
    mask: Tensor | None,
    scale: float,
    sink: Tensor | None,
    expand: Expand | None,
) -> Tensor:
    """Compute `attend` in the space of the cached keys, from [B, Hq, q, D] to [B, H, G * q, Dv].

    `expand` projects partial outputs to the space of the values.
    """
    batch, _, length, _ = query.shape
    # Grouped by KV head: each key is then read once for all query heads of its group.
    packed = query.reshape(batch, state.tail.keys.shape[1], -1, query.shape[3])
    if selecting_router(state, length) is None:
        state.neighbours.read_ahead(state.facts.paged_index + 1)
    slabs = counted_slabs(state, length)
    if slabs is None:
        state.observed.forget_counted()
        parts = _attend_all(state, packed, length, mask, scale, expand)
    else:
        additive = _tail_mask(state, packed, mask, length)
        parts = iter([attend_counting(state, slabs, packed, additive, scale)])
    if sink is not None:
        sink = sink.view(1, packed.shape[1], -1, 1).expand(-1, -1, -1, length).flatten(2)
    return merge_partials(parts, sink)


def _attend_all(
    state: LayerState,
    query: Tensor,
    length: int,
    mask: Tensor | None,
    scale: float,
    expand: Expand | None,
) -> Iterator[Partial]:
    """Yield partial results of `query` [B, H, G * q, D]: the tail's, then of pages."""
    tail = _attend_tail(state, query, length, mask, scale)
    yield tail if expand is None else (expand(tail[0]), tail[1])
    covered, router = _covered(state, length, query), selecting_router(state, length)
    if router is None or (selections := selected(state, router, query, length, scale)) is None:
        state.routing.note(None)
        yield from _attend_all_pages(state, query, scale, covered, expand)
        return
    work = [
        (each.store.tier, functools.partial(attend_selection, each, length, scale, covered))
        for each in selections
        if not each.store.tier.is_remote
    ]
    parts = attend_places(state, query, work, expand)
    if state.settings.probe:
        parts, whole = list(parts), _attend_all_pages(state, query, scale, covered, expand)
        read, of_all = ([tail[1], *(lse for _, lse in each)] for each in (parts, whole))
        state.routing.measure(torch.stack(read), torch.stack(of_all))
    yield from parts


def _attend_all_pages(
    state: LayerState,
    query: Tensor,
    scale: float,
    covered: Tensor | None,
    expand: Expand | None,
) -> Iterator[Partial]:
    """Yield partial results of `query` [B, H, R, D] over all pages."""
    slabs = (slab for slab in state.pages.slabs if not slab.tier.is_remote)
    work = [(slab.tier, functools.partial(_attend_slab, slab, scale, covered)) for slab in slabs]
    if state.pages.slabs:
        yield from attend_places(state, query, work, expand)


def _attend_slab(
    slab: UniformPages | RaggedPages, scale: float, covered: Tensor | None, query: Tensor
) -> Iterator[Partial]:
    """Yield outputs [B, H, R, Dv] and log-sum-exps over pages, which are older than all queries."""
    batch = query.shape[0]
    covered = None if covered is None else covered.to(query.device)
    if covered is None and slab.is_read_by_all(batch) and slab.is_in_order():
        yield from slab.attend(query, scale)
        return
    # Batch rows that share a stored row (beams, forks) attend together: it is read once.
    grouped = query.index_select(0, slab.index("queried", query.device))
    grouped = grouped.unflatten(0, (slab.rows, -1)).transpose(1, 2)
    if covered is not None:
        covered = covered.index_select(0, slab.index("queried", query.device))
        covered = covered.unflatten(0, (slab.rows, -1)).flatten(1, 2)
    for both in slab.attend(grouped.flatten(2, 3), scale, covered):
        each = (t.unflatten(2, grouped.shape[2:4]).transpose(1, 2).flatten(0, 1) for t in both)
        out, lse = (t.index_select(0, slab.index("places", t.device)) for t in each)
        yield slab.spread(out, lse, batch)


def _covered(state: LayerState, length: int, query: Tensor) -> Tensor | None:
    """Return [B, R, n] bool, True where a row of `query` [B, H, R, D] may not see a column.

    None: all tokens in pages are seen. If `covered` is not per new token, its last row is for all.
    """
    covered, seen = state.columns.covered, state.num_seen
    if covered is None:
        return None
    key = (covered, length, seen, query.shape[2], query.device)

    def make() -> Tensor:
        each = covered if covered.shape[1] == length else covered[:, -1:].expand(-1, length, -1)
        each = F.pad(each, (0, seen - each.shape[2])).to(query.device)
        return each.repeat(1, query.shape[2] // length, 1)

    return state.step.remember("covered", key, make)


def _attend_tail(
    state: LayerState, query: Tensor, length: int, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from `query` [B, H, G * q, D] to the tail, causally among the new tokens."""
    keys, values = state.tail.view()
    if length == 1:
        additive = _tail_mask(state, query, mask, length)
        return attend_states(query, keys, values, additive, scale)
    # With keys expanded to every query head, a mask of q x n is enough.
    heads = query.shape[1]
    additive = _tail_mask(state, query, mask, length)
    assert additive is not None, "several new tokens are causal among themselves"
    if additive.shape[0] > 1:
        additive = additive.expand(-1, heads, -1, -1).flatten(0, 1)[:, None]
    apart = query.unflatten(2, (-1, length)).flatten(0, 1)
    keys, values = (_one_per_query_head(t, apart.shape[1]) for t in (keys, values))
    out, lse = attend_states(apart, keys, values, additive, scale)
    return out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


def _tail_mask(state: LayerState, query: Tensor, mask: Tensor | None, length: int) -> Tensor | None:
    """Return the mask of the tail's columns, computed once for all layers of a forward pass."""
    tokens, starts = state.tail.length, state.starts
    key = (mask, length, tokens, starts, query.dtype, query.device)

    def make() -> Tensor | None:
        additive = _additive(mask, length, tokens, query)
        departed = [start - state.first_in_tail for start in starts]
        if not any(departed):
            return additive
        # Columns before the start of a row are in the tail only because other rows need them.
        ends = on_device(tuple(departed), query.device)[:, None]
        is_gone = (torch.arange(tokens, device=query.device) < ends)[:, None, None]
        both = torch.broadcast_shapes(is_gone.shape, (1,) if additive is None else additive.shape)
        whole = new_mask(query, *both)
        if additive is not None:
            whole.copy_(additive)
        return whole.masked_fill_(is_gone, lowest_score(query.dtype))

    return state.step.remember("mask", key, make)


def _one_per_query_head(states: Tensor, groups: int) -> Tensor:
    """Expand [B, H, n, D] to [B * H, G, n, D] without a copy."""
    return states.flatten(0, 1)[:, None].expand(-1, groups, -1, -1)


def _additive(mask: Tensor | None, length: int, tokens: int, query: Tensor) -> Tensor | None:
    """Return the additive mask [B or 1, 1, q, n] of the tail's columns; None = all visible.

    Masked entries are `lowest_score`, not -inf: a query that sees nothing yields no NaN.
    """
    lowest = lowest_score(query.dtype)
    if mask is None or mask.dim() == 2:
        if length == 1 and mask is None:
            return None
        new = torch.arange(length, device=query.device)
        visible = torch.arange(tokens, device=query.device) <= new[:, None] + tokens - length
        visible = visible[None, None]
        if mask is not None:
            visible = visible & mask[:, None, None, -tokens:].bool()
    else:
        visible = mask[..., -tokens:]
        if visible.is_floating_point():
            return new_mask(query, *visible.shape).copy_(visible.clamp_min(lowest))
    return new_mask(query, *visible.shape).masked_fill_(~visible, lowest)


def _original(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call the attention function that `module` would call without a cache attached."""
    shadow = module.config
    config = getattr(shadow, "_pikv_original", shadow)
    name = attention_implementation(config)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if name in ("eager", "sdpa"):
        return function(module, *args, **kwargs)
    try:  # flash attention reads its own name from the module's config
        module.config = config
        return function(module, *args, **kwargs)
    finally:
        module.config = shadow


ALL_ATTENTION_FUNCTIONS.register(NAME, pikv_attention)
