"""Attention over pages where they live: on devices of this process, or on other ranks.

Shapes: B batch rows, H KV heads, R queries of each, Dv value dim.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from pikv_kernels import merge_with_lse
from torch import Tensor

from ..layer.state import LayerState
from ..storage.row_map import Partial
from ..storage.tiers import Tier

# A tier, and a function that attends to pages in it with queries on the tier's device.
Work = tuple[Tier, Callable[[Tensor], Iterator[Partial]]]

# Projects outputs of attention over latents to the space of the values.
Expand = Callable[[Tensor], Tensor]


def attend_places(
    state: LayerState, query: Tensor, work: Sequence[Work], expand: Expand | None = None
) -> Iterator[Partial]:
    """Yield partial results of `query` [B, H, R, D] over disjoint pages, on its device.

    Each device attends to its own pages with a copy of the queries. Each rank attends to its own
    pages, and receives the results of all; if the layer has pages, all ranks must call this together.
    Ranks send what `expand` makes of their outputs.
    """
    here, exchange = query.device, state.pages.places.exchange
    elsewhere: dict[torch.device, list[Callable[[Tensor], Iterator[Partial]]]] = {}
    for tier, attend in work:
        if tier.device != here:
            elsewhere.setdefault(tier.device, []).append(attend)
    results = []
    for device, attends in elsewhere.items():  # before own pages, so that devices work at a time
        there = query.to(device, non_blocking=True)
        out, lse = merge_with_lse([part for attend in attends for part in attend(there)])
        out = out.to(query.dtype)
        state.sent[str(device)] += query.nbytes + out.nbytes + lse.nbytes
        results.append((out, lse))
    own = (part for tier, attend in work if tier.device == here for part in attend(query))
    if exchange is None:
        yield from own
        for out, lse in results:
            yield out.to(here), lse.to(here)
        return
    out, lse = merge_with_lse(list(own) or [_nothing(state, query)])
    out = out if expand is None else expand(out)
    check = None
    if state.step.is_first("exchange"):  # a rank that has drifted apart sees other tokens
        check = state.tail.view()[0][:, :, -1].to(lse.dtype).sum()
    before = exchange.bytes_sent
    yield from exchange.partials(out, lse, check)
    state.sent["ranks"] += exchange.bytes_sent - before


def _nothing(state: LayerState, query: Tensor) -> Partial:
    """Return attention of `query` over no page: zeros, and log-sum-exps of -inf."""
    dim = state.tail.values.shape[3] or state.tail.keys.shape[3]  # latents are their own values
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], dim, dtype=dtype)
    return out, query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
