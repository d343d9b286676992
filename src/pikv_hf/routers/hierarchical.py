from dataclasses import dataclass
from typing import ClassVar

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
    has_ties: ClassVar[bool] = True  # pages that are not searched

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("width", self.width)
        check_count("spread", self.spread)

    def prepared(self, digests: dict[str, Tensor], is_full: Tensor) -> dict[str, Tensor]:
        missing = -digests["bounds"].shape[2] % self.width
        lowest, highest = (
            F.pad(
                torch.where(is_full[..., None], part, value), (0, 0, 0, missing), value=value
            ).unflatten(2, (-1, self.width))
            for part, value in zip(
                digests["bounds"].chunk(2, dim=-1), (torch.inf, -torch.inf), strict=True
            )
        )
        clusters = torch.cat([lowest.amin(3), highest.amax(3)], dim=-1)
        is_empty = clusters[..., 0] == torch.inf
        clusters = clusters.masked_fill(is_empty[..., None], 0)
        return {**digests, "clusters": clusters, "is_empty": is_empty}

    def scores(self, query: Query, pages: Pages) -> Tensor:
        bounds, clusters = pages.digests["bounds"], pages.digests["clusters"]
        searched = min(-(-self.spread * query.max_pages // self.width), clusters.shape[2])
        if searched == clusters.shape[2] and query.limits is None:
            return bound_scores(query, bounds).amax(2, keepdim=True)
        heads, length = query.states.shape[1], query.states.shape[3]
        ranking = bound_scores(query, clusters).amax(2)
        ranking = ranking.masked_fill(pages.digests["is_empty"][:, :, None], -torch.inf)
        best = ranking.topk(searched, dim=-1).indices
        member = torch.arange(self.width, device=best.device)
        index = (best[..., None] * self.width + member).flatten(3)
        index = index.clamp_max(bounds.shape[2] - 1)  # the last cluster may have fewer pages
        own = taken(bounds, index.flatten(2)).unflatten(2, (length, -1))
        each = split_query(query).transpose(2, 3) @ own.mT
        each, lowest = each.amax(3), torch.finfo(each.dtype).min
        if query.limits is not None:
            # Clusters [R, H] that a head would search if it was alone.
            own = -(-self.spread * query.limits // self.width)
            place = torch.arange(searched, device=own.device).repeat_interleave(self.width)
            each = each.masked_fill(place >= own[:, :, None, None], lowest)
        scores = each.new_full((len(each), heads, length, bounds.shape[2]), lowest)
        return scores.scatter_(3, index, each)[:, :, None]
