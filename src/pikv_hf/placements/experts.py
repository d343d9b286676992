"""Pages dealt to the places of their experts.

Shapes: R rows, H KV heads, S new pages of P tokens, k experts of a token, E experts, R places.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.gates import page_shares
from ..storage.places import NewPages
from ..validation import check_number
from .sharding import Dealt, Sharding, in_turn


@dataclass(frozen=True, kw_only=True)
class Experts(Sharding):
    """Deals a page to the place that owns the expert with the largest share in its tokens.

    Place e * R // E owns expert e of E. Unless ranks hold the weights of these experts (expert
    parallelism), owners are turned by one place in each layer, so that a popular expert does not burden
    one place in all layers. A place takes no more than `capacity_factor` times its
    equal share of the pages; what is beyond spills to the places with fewest pages. Pages without
    labels (dense layers) are dealt in turn.

    An exact query reads all pages wherever they are: this placement saves nothing over `Spread`, and
    balances worse. It keeps the pages of an expert together, as PiKV (arXiv 2508.06526) describes.
    """

    capacity_factor: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("capacity_factor", self.capacity_factor, "[1, inf)")

    @property
    def needs_labels(self) -> bool:
        return True

    def deal(self, new: NewPages, places: Dealt) -> Tensor:
        experts = top_experts(new, places)
        if experts is None:
            return in_turn(new, places)
        count, layer = places.count, places.layer
        turn = 0 if places.site.owns_experts else layer.number
        owner = (experts * count // (layer.num_experts or 1) + turn) % count
        return within_capacity(owner, new, count, self.capacity_factor)


def top_experts(new: NewPages, places: Dealt) -> Tensor | None:
    """Return the expert with the largest share in each page, [R, H, S]; None = no labels."""
    num_experts = places.layer.num_experts
    if new.experts is None or new.weights is None or num_experts is None:
        return None
    place = torch.arange(new.experts.shape[3], device=new.experts.device)
    is_token = place < new.filled.to(place.device)[..., None]
    lead = torch.broadcast_shapes(new.filled.shape, new.experts.shape[:3])
    experts, weights = (t.expand(*lead, *t.shape[3:]) for t in (new.experts, new.weights))
    shares = page_shares(experts, weights, num_experts, is_token)
    if new.filled.shape[1] == 1:  # the pages of all KV heads go together
        shares = shares.sum(1, keepdim=True)
    return shares.argmax(-1).to(new.filled.device)


def within_capacity(owner: Tensor, new: NewPages, count: int, factor: float) -> Tensor:
    """Return `owner` [R, H, S] with the pages beyond a place's capacity moved to other places.

    The newest pages move, to the places that hold fewest.
    """
    is_page = (new.filled > 0).flatten().cpu()
    chosen = owner.flatten().cpu()[is_page]
    loads = torch.tensor(new.loads)
    mean = (int(loads.sum()) + len(chosen)) / count
    capacity = max(math.floor(factor * mean), math.ceil(mean))
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=count)
    rank = torch.empty_like(chosen)
    first = (counts.cumsum(0) - counts)[chosen[order]]
    rank[order] = torch.arange(len(chosen)) - first
    free = (capacity - loads).clamp_min(0)
    moves = rank >= free[chosen]
    if moves.any():
        held = loads + counts.minimum(free)
        # A slot for each page that a place may still take, by the pages that it then holds.
        slots = [torch.arange(n, max(capacity, n)) for n in held.tolist()]
        place = torch.arange(count).repeat_interleave(torch.tensor(list(map(len, slots))))
        level = torch.cat(slots)
        chosen[moves] = place[level.argsort(stable=True)[: int(moves.sum())]]
    dealt = torch.zeros(owner.numel(), dtype=owner.dtype)
    dealt[is_page] = chosen
    return dealt.view(owner.shape).to(owner.device)
