"""Records to which a decode step adds, as attention has the weights of its token at hand.

Shapes: B rows, H KV heads, G query heads of each, T tokens held, D key dim, c numbers of a record.
"""

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pikv_kernels import merge_partial
from torch import Tensor

from .compressors.base import weighted_states
from .memory import is_writable
from .records import tail_record
from .rows import Partial
from .slab import Slab

if TYPE_CHECKING:
    from .layer import PagedLayer

Slabs = list[Slab]


def counted_slabs(layer: "PagedLayer", length: int) -> Slabs | None:
    """The slabs of a layer of which attention of `length` new tokens can add to the records.

    None if it cannot: then the queries are kept, and asked again when tokens are sealed.
    """
    observed, slabs = layer.observed, layer.pages.slabs
    if not observed.width or length > 1 or layer.shared.router is not None:
        return None
    if not layer.pages.compressor.gives_weights:
        return None
    if observed.counted is None and observed.has_pending:
        return None  # some would be left out
    batch = layer.tail.batch
    mine = [
        slab
        for slab in slabs
        if isinstance(slab, Slab) and slab.is_read_by_all(batch) and slab.is_in_order()
    ]
    return mine if slabs and len(mine) == len(slabs) else None


def attend_counting(
    layer: "PagedLayer", slabs: Slabs, query: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of `query` [B, H, G, D] of one token over `slabs`, which are all, and the tail.

    `mask` is what is added to the scores of the tail. Returns `[B, H, G, Dv]` and the log-sum-exp.
    """
    scheduler, observed = layer.shared.scheduler, layer.observed
    assert scheduler is not None, "records are those of a scheduler"
    compressor = layer.pages.compressor
    asked = compressor.into_pages(query, slabs[0].fields)
    blocks = (block for slab in slabs for block in slab.blocks())
    results = [compressor.attend_weighted(asked, *block, scale) for block in blocks]
    out, lse = functools.reduce(_merged, ((out, lse) for out, lse, _ in results))
    results.append(weighted_states(query, *layer.tail.view(), mask, scale))
    out, lse = merge_partial(*results[-1][:2], compressor.out_of_pages(out), lse)
    # Records are statistics: nothing of them reaches a gradient.
    shares = [
        weights.detach() * (part - lse).detach().exp()[..., None] for _, part, weights in results
    ]
    weights = torch.cat(shares, dim=-1).float()[:, :, :, None]
    asked_at = torch.arange(layer.seen - 1, layer.seen, device=query.device)
    observed.counted = scheduler.recorded(_records(layer, slabs), weights, asked_at)
    return out, lse


def _merged(one: Partial, other: Partial) -> Partial:
    return merge_partial(*one, *other)


def _records(layer: "PagedLayer", slabs: Slabs) -> Tensor:
    """Those of all tokens [B, H, T, c], the newest one included, as the token before has left them."""
    held = layer.observed.counted
    if held is not None:
        return F.pad(held, (0, 0, 0, 1))
    opened = tail_record(layer)
    sealed = [slab.meta["record"][:, :, : slab.length] for slab in slabs]
    lead = opened.shape[:2]
    return torch.cat([*(t.expand(*lead, *t.shape[2:]) for t in sealed), opened], dim=2)


def write_counted(layer: "PagedLayer") -> bool:
    """Write what was counted to where records are kept, in place; False if there is nothing, or if
    others have the same pages, or inference mode made them."""
    observed, slabs = layer.observed, layer.pages.slabs
    counted = observed.counted
    if counted is None:
        return False
    if any(slab.is_forked or not is_writable(slab.meta["record"]) for slab in slabs):
        return False
    start = 0
    for slab in slabs:
        assert isinstance(slab, Slab), "tokens of pools are not counted"
        record = slab.meta["record"]
        record[:, :, : slab.length] = counted[:, :, start : start + slab.length]
        start += slab.length
    observed.record = counted[:, :, start:].clone()
    return True
