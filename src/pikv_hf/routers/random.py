from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.hashing import hashed, short_seed
from ..validation import check_seed
from .page_router import PageRouter, Pages, Query


@dataclass(frozen=True)
class RandomPages(PageRouter):
    """Reads pages at random, others for each query: the control that every rule must beat.

    A score is a hash of `seed`, layer, KV head, page number and the query's position.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)

    @property
    def is_splittable(self) -> bool:
        return False  # scores depend on the number of a KV head

    def scores(self, query: Query, pages: Pages) -> Tensor:
        heads = torch.arange(query.states.shape[1], device=query.states.device)
        stream = (short_seed(self.seed) * 1009 + query.layer_idx) * 4099 + heads[
            :, None, None, None
        ]
        drawn = hashed((stream << 32) + query.positions()[:, None, None, :, None])
        return hashed(drawn.long() + pages.numbers[:, :, None, None]) / 2**53
