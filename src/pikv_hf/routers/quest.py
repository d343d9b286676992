"""Quest: pages by bounds of their keys.

Shapes: R rows, H KV heads, G query heads of each, q queries, M pages, D key dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .page_router import PageRouter, Pages, Query


@dataclass(frozen=True)
class Quest(PageRouter):
    """Reads the pages with the largest possible attention logits (Tang et al., arXiv 2406.10774).

    A page keeps the minimum and the maximum of each channel of its keys. No logit of the page can
    exceed the sum over channels of max(q minimum, q maximum). A KV head counts the largest bound of
    its query heads.

    The minima and maxima are of what the codes decode to, in the dtype of the model: 2 D numbers a
    page and KV head, 1/P of the bytes of uncompressed pages of P tokens.
    """

    def digest(
        self, keys: Tensor, known: dict[str, Tensor], num_experts: int | None
    ) -> dict[str, Tensor]:
        return {"bounds": page_bounds(keys)}

    def scores(self, query: Query, pages: Pages) -> Tensor:
        return bound_scores(query, pages.digests["bounds"])

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        return scores.float() * scale


def page_bounds(keys: Tensor) -> Tensor:
    """Return the minimum and then the maximum of each channel: [..., 2 D] of keys [..., P, D]."""
    lowest, highest = keys.aminmax(dim=-2)
    return torch.cat([lowest, highest], dim=-1)


def bound_scores(query: Query, bounds: Tensor) -> Tensor:
    """Return upper bounds [R, H, G, q, M] of products with the keys of pages, `bounds` [R, H, M, 2 D].

    The products are with the queries as they are, not scaled.
    """
    split = split_query(query)
    # Bounds come first, so that a CPU does not copy them to make them dense.
    scores = (bounds @ split.flatten(2, 3).mT).mT
    return scores.view(*split.shape[:4], bounds.shape[2])


def split_query(query: Query) -> Tensor:
    """Return the negative and then the positive numbers of the queries, [R, H, G, q, 2 D]."""
    states = query.states
    split = states.new_empty(*states.shape[:-1], 2 * states.shape[-1])
    torch.clamp(states, max=0, out=split[..., : states.shape[-1]])
    torch.clamp(states, min=0, out=split[..., states.shape[-1] :])
    return split
