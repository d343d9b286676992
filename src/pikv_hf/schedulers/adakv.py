from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..validation import check_number
from .base import Candidates, Scheduler, Traits
from .snapkv import SnapKV
from .top_tokens import best_of_each_head, mask_of_best
from .wrapper import Wrapper


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """Shares a layer's budget among its KV heads (Feng et al., arXiv 2407.11550, algorithm 1).

    The best tokens of all heads together are kept, so that a head whose scores are spread keeps
    more than a head whose attention is on few tokens. Every head keeps `alpha` of the mean budget.
    The memory of evicted tokens is freed.

    Args:
        scorer: scheduler whose scores depend on one head alone and are comparable between heads.
        alpha: share of the budget that every head gets, in [0, 1].
    """

    scorer: Scheduler = field(default_factory=SnapKV)
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorer.traits.is_per_head or self.scorer.traits.is_ragged:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, whose heads do not choose independently; it must be "
                "one that scores every KV head apart, such as SnapKV()."
            )
        check_number("alpha", self.alpha, "[0, 1]")

    @property
    def traits(self) -> Traits:
        return replace(super().traits, is_ragged=True, decides_by_scores=False)

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        ranked = self.ranked(tokens, budget)
        heads, places = ranked.shape[1:]
        safe = mask_of_best(ranked, min(int(budget * self.alpha), places))
        shared = ranked.masked_fill(safe, torch.inf)
        if tokens.valid is not None:  # a head may hold fewer tokens than are safe
            shared = shared.masked_fill(~tokens.valid, -torch.inf)
        # Places before heads, so that of equal scores the later tokens are kept in any head.
        flat = shared.transpose(1, 2).flatten(1)
        is_kept = mask_of_best(flat, min(budget * heads, flat.shape[1]))
        is_kept = is_kept.unflatten(1, (places, heads)).transpose(1, 2)
        if tokens.valid is not None:
            is_kept = is_kept & tokens.valid
        counts = is_kept.sum(-1)
        return best_of_each_head(self.reranked(tokens, shared, counts), counts)
