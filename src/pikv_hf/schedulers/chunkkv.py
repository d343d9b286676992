from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..validation import check_count
from .base import Candidates, Scheduler, Traits
from .snapkv import SnapKV
from .wrapper import Wrapper


@dataclass(frozen=True)
class ChunkKV(Wrapper):
    """Keeps or evicts whole chunks of tokens (Liu et al., arXiv 2502.00299, section 3.2).

    Candidates are cut into chunks of `chunk_length`, oldest first. The score of a chunk is the mean
    over its tokens and all KV heads, so that every head keeps the same chunks. If the budget ends
    within a chunk, its newest tokens are kept.

    Args:
        scorer: scheduler whose scores are averaged.
        chunk_length: tokens of a chunk.
    """

    scorer: Scheduler = field(default_factory=SnapKV)
    chunk_length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorer.traits.decides_by_scores:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, which chooses by more than its scores; it must be one "
                "that only scores tokens, such as SnapKV()."
            )
        check_count("chunk_length", self.chunk_length)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, is_per_head=False)

    def scores(self, tokens: Candidates) -> Tensor:
        scores = self.scorer.scores(tokens).mean(dim=1)
        chunk = torch.arange(scores.shape[-1], device=scores.device) // self.chunk_length
        chunks = int(-(-scores.shape[-1] // self.chunk_length))
        total = scores.new_zeros(scores.shape[0], chunks).index_add_(1, chunk, scores)
        mean = total / torch.bincount(chunk, minlength=chunks)
        return mean[:, None, chunk].expand(-1, tokens.keys.shape[1], -1)
