from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_number
from .base import Candidates, Needs, Scheduler, TokenStatistics


@dataclass(frozen=True)
class LRU(Scheduler, TokenStatistics):
    """Evicts least recently used tokens (PiKV, arXiv 2508.06526, table of schedulers: u = -r).

    r is the number of tokens since a token was used: since a query head of its KV head gave it at
    least `threshold` of its attention, or since it was cached. Being read does not count as use:
    every query reads all pages, so that only age would decide.

    Args:
        threshold: attention in (0, 1] that counts as use.
    """

    threshold: float = 0.01

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, "(0, 1]")

    @property
    def needs(self) -> Needs:
        return Needs(statistics=self)

    @property
    def num_statistics(self) -> int:
        return 1

    def updated(self, statistics: Tensor, weights: Tensor, query_positions: Tensor) -> Tensor:
        return last_use(statistics[..., 0], self._is_used(weights), query_positions)[..., None]

    def scores(self, tokens: Candidates) -> Tensor:
        assert tokens.statistics is not None, "they are among the needs"
        return torch.maximum(tokens.statistics[..., 0].double(), tokens.positions.double())

    def _is_used(self, weights: Tensor) -> Tensor:
        """Return [R, H, m, T], True where one of m queries uses a token."""
        return weights.amax(dim=2) >= self.threshold


def last_use(before: Tensor, is_used: Tensor, query_positions: Tensor) -> Tensor:
    """Return the position of the newest query that used each token, [R, H, T].

    `before` are the positions until now; `query_positions` [R or 1, m] are of new queries.
    """
    return torch.maximum(before, (is_used * query_positions[:, None, :, None].float()).amax(dim=2))
