from dataclasses import dataclass

from torch import Tensor

from .page_router import PageRouter, Pages, Query


@dataclass(frozen=True)
class Oracle(PageRouter):
    """Reads the pages that get the most attention: what no other rule can exceed, for reports.

    It decodes all keys for each query to find them, so that it is slower than reading all pages. A
    KV head counts the attention of its query heads, each divided by what its pages get together.
    """

    def scores(self, query: Query, pages: Pages) -> Tensor:
        keys = pages.keys()
        states = query.states.flatten(2, 3).float() * query.scale
        products = states @ keys.flatten(2, 3).float().mT
        masses = products.unflatten(3, keys.shape[2:4]).logsumexp(-1)
        return masses.unflatten(2, query.states.shape[2:4])

    def over_group(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).sum(2).log()

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        return scores
