from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from .base import Candidates, Needs, Scheduler, Traits


@dataclass(frozen=True)
class Wrapper(Scheduler):
    """Uses the scores of another scheduler; subclasses change how they decide what is kept.

    Args:
        scorer: scheduler whose scores are used.
    """

    scorer: Scheduler

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scheduler):
            raise TypeError(f"`scorer` is {self.scorer!r}; it must be a Scheduler.")
        if self.scorer.traits.has_lengths:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, whose heads have lengths of their own, whatever the "
                "scores."
            )

    @property
    def needs(self) -> Needs:
        return self.scorer.needs

    @property
    def traits(self) -> Traits:
        return replace(self.scorer.traits, is_ragged=False)

    def check(self, model: PreTrainedModel, layers: int) -> None:
        self.scorer.check(model, layers)

    def tensors(self, layer_idx: int) -> Iterable[Tensor]:
        return self.scorer.tensors(layer_idx)

    def budget(self, seen: int) -> int | None:
        return self.scorer.budget(seen)

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        return self.scorer.layer_budget(budget, available, layer, layers)

    def scores(self, tokens: Candidates) -> Tensor:
        return self.scorer.scores(tokens)

    def protected(self, tokens: Candidates, budget: int) -> Tensor | None:
        return self.scorer.protected(tokens, budget)

    def reranked(self, tokens: Candidates, ranked: Tensor, counts: Tensor) -> Tensor:
        return self.scorer.reranked(tokens, ranked, counts)
