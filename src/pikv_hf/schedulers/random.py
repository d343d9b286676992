from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.hashing import hashed, short_seed
from ..validation import check_seed
from .base import Candidates, Scheduler, Traits


@dataclass(frozen=True)
class Random(Scheduler):
    """Keeps tokens at random: the control that every policy must beat.

    A score is a hash of `seed`, layer, KV head and position: equal in all rows and evictions.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)

    @property
    def traits(self) -> Traits:
        return Traits(numbers_heads=True)

    def scores(self, tokens: Candidates) -> Tensor:
        heads = torch.arange(tokens.positions.shape[1], device=tokens.positions.device)
        stream = (short_seed(self.seed) * 1009 + tokens.layer_idx) * 4099 + heads[:, None]
        return hashed((stream << 32) + tokens.positions.long())
