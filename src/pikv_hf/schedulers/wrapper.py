from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .base import Scheduler, Tokens


@dataclass(frozen=True)
class Wrapper(Scheduler):
    """A scheduler that changes what another one's scores lead to.

    Args:
        scorer: whose scores decide.
    """

    scorer: Scheduler

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scheduler):
            raise TypeError(f"`scorer` is {self.scorer!r}; it must be a Scheduler.")
        if self.scorer.has_lengths:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, whose heads have lengths of their own, whatever the "
                "scores."
            )

    @property
    def is_per_head(self) -> bool:
        return self.scorer.is_per_head

    @property
    def exceeds_budget(self) -> bool:
        return self.scorer.exceeds_budget

    @property
    def decides_by_scores(self) -> bool:
        return self.scorer.decides_by_scores

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs

    @property
    def observed_queries(self) -> int:
        return self.scorer.observed_queries

    @property
    def records(self) -> int:
        return self.scorer.records

    def recorded(self, record: Tensor, weights: Tensor, asked_at: Tensor) -> Tensor:
        return self.scorer.recorded(record, weights, asked_at)

    @property
    def constants(self) -> int:
        return self.scorer.constants

    @property
    def constant_needs(self) -> frozenset[str]:
        return self.scorer.constant_needs

    def constant(self, tokens: Tokens) -> Tensor:
        return self.scorer.constant(tokens)

    @property
    def controls(self) -> int:
        return self.scorer.controls

    def controlled(self, tokens: Tokens, keep: Tensor) -> Tensor:
        return self.scorer.controlled(tokens, keep)

    @property
    def least(self) -> int:
        return self.scorer.least

    @property
    def repetition(self) -> Any:
        return self.scorer.repetition

    def check(self, model: PreTrainedModel, layers: int) -> None:
        self.scorer.check(model, layers)

    def tensors(self, layer_idx: int) -> Iterable[Tensor]:
        return self.scorer.tensors(layer_idx)

    def budget(self, seen: int) -> int | None:
        return self.scorer.budget(seen)

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        return self.scorer.layer_budget(budget, available, layer, layers)

    def scores(self, tokens: Tokens) -> Tensor:
        return self.scorer.scores(tokens)

    def protected(self, tokens: Tokens, budget: int) -> Tensor | None:
        return self.scorer.protected(tokens, budget)

    def reranked(self, tokens: Tokens, ranked: Tensor, counts: Tensor) -> Tensor:
        return self.scorer.reranked(tokens, ranked, counts)
