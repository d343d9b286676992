"""Which tokens stay."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Candidates of R rows with equally many of them, H KV heads, T tokens each, oldest first.

    `positions` [R, H, T] int64: columns of the sequence, padding included, ascending.
    `seen`: tokens that the layer has ever been given.
    """

    positions: Tensor
    seen: int


class Scheduler(ABC):
    """Decides, whenever tokens leave the tail, which sealed and newly sealed tokens stay.

    A scheduler is a frozen dataclass: its own configuration, without run state.
    """

    @property
    def least(self) -> int:
        """Sealed tokens that stay even if the open ones fill the budget."""
        return 0

    @abstractmethod
    def budget(self, seen: int) -> int:
        """Tokens per row and KV head to hold after `seen` tokens, the tail included."""

    @abstractmethod
    def scores(self, tokens: Tokens) -> Tensor:
        """[R, H, T] float; the highest stay, of equal ones the later. Changes nothing."""

    def keep(self, tokens: Tokens, budget: int) -> Tensor:
        """Indices [R, H, budget] of the tokens that stay, ascending; changes nothing."""
        scores = self.scores(tokens)
        # Of equal scores the later token stays: a stable sort, from the newest to the oldest.
        newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
        return (scores.shape[-1] - 1 - newest_first[..., :budget]).sort(dim=-1).values
