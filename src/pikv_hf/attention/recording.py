"""Token statistics updated in a decode step, where attention has computed the weights.

Shapes: B rows, H KV heads, G query heads of each, T tokens held, D key dim, c numbers of a token.
"""

import functools

import torch
import torch.nn.functional as F
from pikv_kernels import merge_partial
from torch import Tensor

from ..layer.records import tail_record
from ..layer.state import LayerState
from ..routers import PageRouter
from ..storage.codec import weighted_states
from ..storage.row_map import Partial
from ..storage.uniform_pages import UniformPages

Slabs = list[UniformPages]


def counted_slabs(state: LayerState, length: int) -> Slabs | None:
    """Return all slabs if attention of `length` new tokens can update the token statistics.

    If it cannot, return None: the queries are then kept until they are settled.
    """
    observed, slabs = state.observed, state.pages.slabs
    if not observed.width or length > 1 or isinstance(state.settings.router, PageRouter):
        return None
    if not state.pages.codec.gives_weights or state.pages.places.count > 1:
        return None
    if observed.counted is None and observed.has_pending:
        return None  # the statistics would miss the pending queries
    if state.columns.hidden is not None or state.columns.covered is not None:
        return None  # rows hold different numbers of tokens, or a mask hides some
    batch, here = state.tail.batch, state.tail.keys.device
    readable = [
        slab
        for slab in slabs
        if isinstance(slab, UniformPages)
        and slab.is_read_by_all(batch)
        and slab.is_in_order()
        and slab.tier.device == here
    ]
    return readable if slabs and len(readable) == len(slabs) else None


def attend_counting(
    state: LayerState, slabs: Slabs, query: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from one token to all slabs and the tail, and update the token statistics.

    `query` [B, H, G, D]; `mask` is added to the tail's scores.
    Returns `[B, H, G, Dv]` and the log-sum-exp.
    """
    statistics, observed = state.settings.needs.statistics, state.observed
    assert statistics is not None, "records are of a scheduler"
    compressor = state.pages.codec
    page_query = compressor.into_pages(query, slabs[0].fields)
    blocks = (block for slab in slabs for block in slab.blocks())
    results = [
        compressor.attend_weighted(page_query, block.fields, block.tokens, scale)
        for block in blocks
    ]
    out, lse = functools.reduce(_merged, ((out, lse) for out, lse, _ in results))
    results.append(weighted_states(query, *state.tail.view(), mask, scale))
    out, lse = merge_partial(*results[-1][:2], compressor.out_of_pages(out), lse)
    # Detached, because no gradient flows through token statistics.
    shares = [
        weights.detach() * (part - lse).detach().exp()[..., None] for _, part, weights in results
    ]
    weights = torch.cat(shares, dim=-1).float()[:, :, :, None]
    position = torch.arange(state.num_seen - 1, state.num_seen, device=query.device)[None]
    observed.count(statistics.updated(_records(state, slabs), weights, position))
    return out, lse


def _merged(one: Partial, other: Partial) -> Partial:
    return merge_partial(*one, *other)


def _records(state: LayerState, slabs: Slabs) -> Tensor:
    """Return the statistics of all tokens [B, H, T, c] before the newest query updates them."""
    held = state.observed.counted
    if held is not None:
        return F.pad(held, (0, 0, 0, 1))
    opened = tail_record(state)
    sealed = [slab.meta["record"][:, :, : slab.length] for slab in slabs]
    lead = opened.shape[:2]
    return torch.cat([*(t.expand(*lead, *t.shape[2:]) for t in sealed), opened], dim=2)
