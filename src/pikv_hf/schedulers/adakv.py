from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .base import Candidates, Scheduler, Traits
from .snapkv import SnapKV
from .top_tokens import best_of_each_head, mask_of_best
from .wrapper import Wrapper


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """KV heads share a layer's budget by need (Feng et al., arXiv 2407.11550, algorithm 1).

    The best tokens of all heads together stay, so that a head whose scores are spread keeps more
    than one whose attention goes to few tokens; but every head keeps `alpha` of the mean budget.
    The tokens of a head that are not kept are freed.

    Args:
        scorer: whose scores decide; they must be of each head alone, and comparable between heads.
        alpha: share of the budget that all heads have alike, in [0, 1].
    """

    scorer: Scheduler = field(default_factory=SnapKV)
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorer.traits.is_per_head or self.scorer.traits.is_ragged:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, whose heads do not choose each for itself; it must be "
                "one that scores every KV head apart, such as SnapKV()."
            )
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` is {self.alpha!r}; it must be a number in [0, 1].")

    @property
    def traits(self) -> Traits:
        return replace(super().traits, is_ragged=True, decides_by_scores=False)

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        ranked = self.ranked(tokens, budget)
        heads, places = ranked.shape[1:]
        safe = mask_of_best(ranked, min(int(budget * self.alpha), places))
        shared = ranked.masked_fill(safe, torch.inf)
        if tokens.valid is not None:  # a head with fewer tokens than are safe
            shared = shared.masked_fill(~tokens.valid, -torch.inf)
        # Of equal scores the later tokens stay, whatever their heads: places before heads.
        flat = shared.transpose(1, 2).flatten(1)
        stays = mask_of_best(flat, min(budget * heads, flat.shape[1]))
        stays = stays.unflatten(1, (places, heads)).transpose(1, 2)
        if tokens.valid is not None:
            stays = stays & tokens.valid
        counts = stays.sum(-1)
        return best_of_each_head(self.reranked(tokens, shared, counts), counts)
