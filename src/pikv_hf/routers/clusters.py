"""Pages by the centroids of their keys.

Shapes: R rows, H KV heads, G query heads of each, q queries, S pages of P tokens, M pages, D key dim,
c centroids of a page.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_count
from .page_router import PageRouter, Pages, Query

STEPS = 4  # of k-means


@dataclass(frozen=True)
class Clusters(PageRouter):
    """Reads the pages whose centroids foretell the most attention.

    The keys of a page are divided into `centroids` clusters by k-means when the page is sealed. The
    score of a page is the logarithm of the sum, over its clusters, of n exp(q c) for a centroid c of n
    keys: the attention that the page would get if each key was its centroid. Such segmented
    clustering is of RetroInfer (arXiv 2505.02922) and ClusterKV (arXiv 2412.03213), which read
    single clusters; here a segment is a page, and is read as a whole.

    Centroids take `centroids` D numbers a page and KV head in the dtype of the model.
    """

    centroids: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("centroids", self.centroids)

    def digest(
        self, keys: Tensor, known: dict[str, Tensor], num_experts: int | None
    ) -> dict[str, Tensor]:
        centroids, sizes = k_means(keys.float(), min(self.centroids, keys.shape[3]))
        return {"centroids": centroids.to(keys.dtype), "sizes": sizes}

    def scores(self, query: Query, pages: Pages) -> Tensor:
        centroids, sizes = pages.digests["centroids"], pages.digests["sizes"]
        states = query.states.flatten(2, 3)
        # Centroids come first, so that a CPU does not copy them to make them dense.
        products = (centroids.flatten(2, 3) @ states.mT).mT.unflatten(3, centroids.shape[2:4])
        terms = products.float() * query.scale + sizes[:, :, None].log()
        return terms.logsumexp(-1).unflatten(2, query.states.shape[2:4])

    def over_group(self, scores: Tensor) -> Tensor:
        return scores.logsumexp(2)

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        return scores


def k_means(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` centroids [R, H, S, c, D] of the keys [R, H, S, P, D] of each page, and sizes.

    The sizes [R, H, S, c] float32 count the keys of each cluster. The first centroids are keys at
    equal distances in the page. An empty cluster keeps its centroid, and has the size 0.
    """
    tokens = keys.shape[3]
    first = [math.floor(number * tokens / count) for number in range(count)]
    centroids = keys[:, :, :, first]
    for _ in range(STEPS):
        # The squared distance without the norm of the key, which is the same for all centroids.
        distance = centroids.square().sum(-1)[..., None, :] - 2 * keys @ centroids.mT
        member = torch.nn.functional.one_hot(distance.argmin(-1), count).to(keys.dtype)
        sizes = member.sum(3)
        means = member.mT @ keys / sizes.clamp_min(1)[..., None]
        centroids = torch.where(sizes[..., None] > 0, means, centroids)
    return centroids, sizes
