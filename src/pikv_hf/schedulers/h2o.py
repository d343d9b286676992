from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_flag, check_number
from .base import Candidates, Needs, Scheduler, TokenStatistics


@dataclass(frozen=True)
class H2O(Scheduler, TokenStatistics):
    """Keeps heavy hitters and recent tokens (Zhang et al., arXiv 2306.14048, algorithm 1).

    The score is the sum of the attention that a token got from all queries while it was held, and
    from all query heads of its KV head. A decode step takes the weights from its own attention, if
    pages are stored uncompressed or as codes with scales. For a prompt, and for tokens that may be
    removed again, attention is computed a second time, a few queries at a time.

    Args:
        recent_ratio: share of the budget, in [0, 1], for newest tokens and tail; the paper: 0.5.
        mean: divide the sum by the number of queries that could see the token, so that old tokens
            have no advantage.
    """

    recent_ratio: float = 0.5
    mean: bool = False

    def __post_init__(self) -> None:
        check_number("recent_ratio", self.recent_ratio, "[0, 1]")
        check_flag("mean", self.mean)

    @property
    def needs(self) -> Needs:
        return Needs(statistics=self)

    @property
    def num_statistics(self) -> int:
        return 1

    def updated(self, statistics: Tensor, weights: Tensor, query_positions: Tensor) -> Tensor:
        return statistics + weights.sum((2, 3))[..., None]

    def scores(self, tokens: Candidates) -> Tensor:
        assert tokens.statistics is not None, "they are among the needs"
        total = tokens.statistics[..., 0]
        return total / (tokens.seen - tokens.positions) if self.mean else total

    def protected(self, tokens: Candidates, budget: int) -> Tensor:
        opened = tokens.open_keys.shape[2]
        recent = int(self.recent_ratio * (budget + opened)) - opened
        place = torch.arange(tokens.keys.shape[2], device=tokens.keys.device)
        return place >= len(place) - recent
