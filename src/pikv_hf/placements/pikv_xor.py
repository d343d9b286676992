"""Pages dealt by the map of the PiKV paper.

Shapes: R rows, H KV heads, S new pages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.places import NewPages
from .experts import top_experts
from .sharding import Dealt, Sharding


@dataclass(frozen=True, kw_only=True)
class PiKVXor(Sharding):
    """Deals page n, whose expert with the largest share is e, to place (n mod R) xor (e mod R).

    That is our reading of the map (t mod N_tok) xor (e mod N_exp) of PiKV (arXiv 2508.06526) for R
    places: with R = N_tok = N_exp, a power of two, it fills all places; other numbers leave some
    empty or uneven. Pages without labels (dense layers) have e = 0.
    """

    def check(self, count: int) -> None:
        if count & (count - 1):
            raise ValueError(
                f"`placement` is {self}, which needs a power of two of places, but there are {count}: use "
                "'spread'."
            )

    @property
    def needs_labels(self) -> bool:
        return True

    def deal(self, new: NewPages, places: Dealt) -> Tensor:
        device = new.filled.device
        number = new.dealt + torch.arange(new.filled.shape[2], device=device)
        experts = top_experts(new, places)
        experts = torch.zeros_like(new.filled) if experts is None else experts
        return (number % places.count) ^ (experts % places.count)
