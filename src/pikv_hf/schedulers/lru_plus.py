from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_number
from .base import Candidates
from .lru import LRU, last_use


@dataclass(frozen=True)
class LRUPlus(LRU):
    """Evicts tokens of old and rare use (PiKV, arXiv 2508.06526: u = -r + weight * f).

    r is defined as in `LRU`. f is the number of queries that have used the token.

    Args:
        threshold: attention in (0, 1] that counts as use.
        weight: tokens of recency that one use is worth, >= 0.
    """

    weight: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight", self.weight)

    @property
    def num_statistics(self) -> int:
        return 2

    def updated(self, statistics: Tensor, weights: Tensor, query_positions: Tensor) -> Tensor:
        last, uses = statistics.unbind(-1)
        is_used = self._is_used(weights)
        return torch.stack(
            [last_use(last, is_used, query_positions), uses + is_used.sum(dim=2)], dim=-1
        )

    def scores(self, tokens: Candidates) -> Tensor:
        assert tokens.statistics is not None, "they are among the needs"
        return super().scores(tokens) + self.weight * tokens.statistics[..., 1].double()
