from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage.gather import taken
from ..validation import check_count
from .page_router import Pages, Query
from .quest import Quest, bound_scores, split_query


@dataclass(frozen=True)
class Hierarchical(Quest):
    """Selects clusters of pages first, then pages among them, both by Quest's bounds.

    A cluster is `width` adjacent pages, and its bounds are those of all their keys. The clusters
    with the highest bounds are searched: `spread` times as many pages as are read. PiKV's R_H
    (arXiv 2508.06526, table 1), with clusters of pages instead of groups of experts.
    """

    width: int = 8
    spread: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("width", self.width)
        check_count("spread", self.spread)

    def prepared(self, digests: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = -digests["bounds"].shape[2] % self.width
        lowest, highest = (
            F.pad(part, (0, 0, 0, missing), value=value).unflatten(2, (-1, self.width))
            for part, value in zip(
                digests["bounds"].chunk(2, dim=-1), (torch.inf, -torch.inf), strict=True
            )
        )
        clusters = torch.cat([lowest.amin(3), highest.amax(3)], dim=-1)
        return {**digests, "clusters": clusters}

    def scores(self, query: Query, pages: Pages) -> Tensor:
        bounds, clusters = pages.digests["bounds"], pages.digests["clusters"]
        searched = -(-self.spread * query.max_pages // self.width)
        if searched >= clusters.shape[2]:
            return bound_scores(query, bounds).amax(2, keepdim=True)
        heads, length = query.states.shape[1], query.states.shape[3]
        best = bound_scores(query, clusters).amax(2).topk(searched, dim=-1).indices
        member = torch.arange(self.width, device=best.device)
        index = (best[..., None] * self.width + member).flatten(3)
        index = index.clamp_max(bounds.shape[2] - 1)  # the last cluster may have fewer pages
        own = taken(bounds, index.flatten(2)).unflatten(2, (length, -1))
        each = split_query(query).transpose(2, 3) @ own.mT
        scores = each.new_full((len(each), heads, length, bounds.shape[2]), -torch.inf)
        return scores.scatter_(3, index, each.amax(3))[:, :, None]
