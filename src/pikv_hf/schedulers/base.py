"""Which tokens stay."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Candidates of R rows with equally many of them, H KV heads, T tokens each, oldest first.

    `positions` [R, H, T] int64: columns of the sequence, padding included, ascending. `keys`
    [R, H, T, D] and `values` [R, H, T, Dv] are those that the cache holds: keys after their rotary
    embedding, or latents without values (Dv = 0). `seen`: tokens that layer `layer_idx` has ever
    been given.

    `open_keys` [R, H, n, D] are the newest n tokens, which stay in any case. `queries`
    [R, H, G, m, D], asked with the factor `scale`, are those of the newest m tokens and of the G
    query heads of each KV head: as many as `observed_queries` of the scheduler, or fewer at first;
    zeros stand for padding. None if it asks for none.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    open_keys: Tensor
    seen: int
    layer_idx: int = 0
    queries: Tensor | None = None
    scale: float = 1.0


class Scheduler(ABC):
    """Decides, whenever tokens leave the tail, which sealed and newly sealed tokens stay.

    A scheduler is a frozen dataclass: its own configuration, without run state.
    """

    @property
    def observed_queries(self) -> int:
        """How many of a layer's newest tokens it wants the queries of; 0 = none."""
        return 0

    @property
    def least(self) -> int:
        """Sealed tokens that stay even if the open ones fill the budget."""
        return 0

    def budget(self, seen: int) -> int | None:
        """Tokens per row and KV head to hold after `seen` tokens, the tail included.

        None: the scheduler has none of its own, a cache must be given one.
        """
        return None

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        """How many tokens paged layer `layer` of `layers` may hold in pages.

        `budget` is the mean over the layers, `available` what it would hold had it dropped none.
        """
        return budget

    @abstractmethod
    def scores(self, tokens: Tokens) -> Tensor:
        """[R, H, T] float; the highest stay, of equal ones the later. Changes nothing."""

    def keep(self, tokens: Tokens, budget: int) -> Tensor:
        """Indices [R, H, budget] of the tokens that stay, ascending; changes nothing."""
        return newest_of_best(self.scores(tokens), budget).sort(dim=-1).values


def newest_of_best(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the highest `scores` [..., T], of equal ones the later."""
    # A stable sort, from the newest to the oldest.
    newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return scores.shape[-1] - 1 - newest_first[..., :count]
