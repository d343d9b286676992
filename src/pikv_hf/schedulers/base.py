"""Which tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.rotary import Rotary
from .top_tokens import best_places


@dataclass(frozen=True)
class Candidates:
    """The tokens to choose from: of R rows, T places for each of their H KV heads, oldest first.

    `positions` [R, H, T] int64: columns of the sequence, padding included, ascending. `keys`
    [R, H, T, D] are those that the cache holds: after their rotary embedding, or latents. `valid` [R, H, T]: which places hold a token, the
    last ones of each head; None = all. The oldest `sinks` tokens stay in any case. `seen`: tokens
    that layer `layer_idx` has ever been given, `padding` of them before the first of these rows.

    `open_keys` [R, H, n, D] are those of the newest n tokens, which stay in any case. Where
    keys are latents, `latent_rank` of their dims are the value, too. `queries` [R, H, G, m, D], asked with the factor `scale`, are those of the newest m tokens and of the G
    query heads of each KV head: as many as the scheduler needs, or fewer at first;
    zeros stand for padding. None if it asks for none.

    `statistics` [R, H, T, c]: the numbers that are kept of each token, after all queries so far;
    `constants` [R, H, T, c]: numbers of each token that never change; `row_state` [R, c]: numbers of
    each row, as the last decision left them; None if the scheduler needs none.

    What is among the `inputs` that a scheduler needs, else None: `values` [R, H, T, Dv] and `open_values`, beside latents with
    Dv = 0; `experts` [R, 1 or H, T, k] and `weights`, the choice of the
    model's gate for each candidate, `open_experts` [R, 1, n, k] and `open_weights` those of the open
    tokens (None, too, in a layer without a gate); `output` [hidden, Hq * Dv], the weight of the
    layer's output projection; `module`, its attention module; `rotary`, how its keys and queries turn
    with their position (a difference of columns is one of positions).

    `notes` is empty at the first layer of each forward pass: what earlier layers left for later ones.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor | None
    open_keys: Tensor
    seen: int
    layer_idx: int = 0
    queries: Tensor | None = None
    scale: float = 1.0
    statistics: Tensor | None = None
    constants: Tensor | None = None
    row_state: Tensor | None = None
    valid: Tensor | None = None
    sinks: int = 0
    padding: int = 0
    open_values: Tensor | None = None
    latent_rank: int | None = None
    experts: Tensor | None = None
    weights: Tensor | None = None
    open_experts: Tensor | None = None
    open_weights: Tensor | None = None
    output: Tensor | None = None
    module: Any = None
    rotary: Rotary | None = None
    notes: dict[Any, Any] = field(default_factory=dict)

    def number(self) -> Tensor:
        """Of each place, how many tokens of its head are older: [R or 1, H or 1, T]; < 0 = no token."""
        if self.valid is None:
            return torch.arange(self.keys.shape[2], device=self.keys.device)[None, None]
        return self.valid.cumsum(-1).masked_fill(~self.valid, 0) - 1

    def asked_by_newest(self, count: int) -> Candidates:
        """The same with the queries of at most `count` tokens, the newest."""
        if self.queries is None or not count:
            return self
        return replace(self, queries=self.queries[:, :, :, -count:])


class TokenStatistics(ABC):
    """Numbers that are kept of each token, which every later query may change."""

    @property
    @abstractmethod
    def num_statistics(self) -> int:
        """How many numbers."""

    @abstractmethod
    def updated(self, statistics: Tensor, weights: Tensor, asked_at: Tensor) -> Tensor:
        """`statistics` [R, H, T, n] of tokens, zeros at first, after m more queries.

        `weights` [R, H, G, m, T]: how the queries of positions `asked_at` [m] attend to the tokens,
        in float32; zeros stand for padding. Changes nothing.
        """


class TokenConstants(ABC):
    """Numbers that are computed of each token once, when it leaves the tail, and kept with it."""

    #: How many numbers.
    num_constants: ClassVar[int] = 1

    #: Which of `values`, `output` and `module` `constants` finds in the candidates.
    constant_inputs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def constants(self, tokens: Candidates) -> Tensor:
        """The numbers [R, H, T, n] of tokens that leave the tail. Changes nothing."""


class RowState(ABC):
    """Numbers that are kept of each row of a layer from one decision to the next."""

    #: How many numbers.
    num_row_state: ClassVar[int] = 1

    @abstractmethod
    def next_row_state(self, tokens: Candidates, keep: Tensor) -> Tensor:
        """The numbers [R, n] after it was decided that `keep` stays; zeros at first."""


@dataclass(frozen=True)
class Needs:
    """What a scheduler asks the cache for. The cache reads it once, and fills `Candidates` with it.

    Args:
        queries: newest tokens to keep the queries of.
        inputs: which of `values`, `experts`, `output`, `module` and `rotary` to hand over; and
            `rerotate`, if kept keys are to close the gaps between them.
        sinks: first tokens of each row that stay even if the tail fills the budget.
        statistics: numbers of each token that queries change, and how.
        constants: numbers of each token that never change, and how to compute them.
        row_state: numbers of each row, and how a decision changes them.
        repetition: how the model is to repeat what a cache held back, which marks tokens, with
            `prompt_ids`, `chunk_size`, `overlap` and `sinks` (KVzip). The statistics [R, H, T, 1] are
            then the largest attention that each token got, 0 if it was not repeated.
    """

    queries: int = 0
    inputs: frozenset[str] = frozenset()
    sinks: int = 0
    statistics: TokenStatistics | None = None
    constants: TokenConstants | None = None
    row_state: RowState | None = None
    repetition: Any = None

    def __or__(self, other: Needs) -> Needs:
        """The needs of two schedulers that share one cache; of things to compute `other` has its own."""
        return Needs(
            queries=max(self.queries, other.queries),
            inputs=self.inputs | other.inputs,
            sinks=max(self.sinks, other.sinks),
            statistics=other.statistics or self.statistics,
            constants=other.constants or self.constants,
            row_state=other.row_state or self.row_state,
            repetition=other.repetition or self.repetition,
        )


@dataclass(frozen=True)
class Traits:
    """How a scheduler chooses, as far as others must know.

    Args:
        is_ragged: KV heads may keep different numbers of tokens.
        is_per_head: the scores of a KV head depend on nothing of the others.
        decides_by_scores: a KV head keeps its highest scores, and what is `protected`; no more decides.
        exceeds_budget: some layers keep more than their share, on top of the budget.
        has_lengths: KV heads have `lengths` of their own; a cache is given no budget.
    """

    is_ragged: bool = False
    is_per_head: bool = True
    decides_by_scores: bool = True
    exceeds_budget: bool = False
    has_lengths: bool = False


class Scheduler(ABC):
    """Decides, whenever tokens leave the tail, which sealed and newly sealed tokens stay.

    A scheduler is a frozen dataclass: its own configuration, without run state. It defines `scores`
    and says what it `needs` for them; everything else has a default.
    """

    #: Whether it must be given a file that was made for the model.
    needs_file: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What it asks the cache for."""
        return Needs()

    @property
    def traits(self) -> Traits:
        """What others must know of how it chooses."""
        return Traits()

    def check(self, model: PreTrainedModel, layers: int) -> None:
        """Raise ValueError if it cannot serve `model`, of which `layers` layers are paged, as when its
        file is of another one. Called before a cache is attached."""
        return

    def tensors(self, layer_idx: int) -> Iterable[Tensor]:
        """What it holds for a layer: a part of the bytes of a cache."""
        return ()

    def lengths(self, layer_idx: int, left: int, budget: int) -> Tensor:
        """Candidates [H] that each KV head of layer `layer_idx` may hold in pages.

        Of each head `left` tokens have left the tail; `budget` is the scheduler's own, without those
        that stay open. Only called where `traits.has_lengths`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no lengths.")

    def budget(self, seen: int) -> int | None:
        """Candidates per row and KV head to hold after `seen` tokens, the tail included.

        None: the scheduler has none of its own, a cache must be given one.
        """
        return None

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        """How many tokens paged layer `layer` of `layers` may hold in pages.

        `budget` is the mean over the layers, `available` what it would hold had it dropped none.
        """
        return budget

    @abstractmethod
    def scores(self, tokens: Candidates) -> Tensor:
        """[R, H, T] float; the highest stay, of equal ones the later. Changes `notes` alone.

        Scores of places without a token are never read.
        """

    def protected(self, tokens: Candidates, budget: int) -> Tensor | None:
        """Places [T] that stay within `budget` whatever their scores; None = none. Changes nothing."""
        return None

    def ranked(self, tokens: Candidates, budget: int) -> Tensor:
        """`scores`, with sinks and protected tokens above all, places without a token below all."""
        scores, number = self.scores(tokens), tokens.number()
        if tokens.sinks:
            scores = scores.masked_fill((number >= 0) & (number < tokens.sinks), torch.inf)
        protected = self.protected(tokens, budget)
        if protected is not None:
            scores = scores.masked_fill(protected, torch.inf)
        return scores if tokens.valid is None else scores.masked_fill(number < 0, -torch.inf)

    def reranked(self, tokens: Candidates, ranked: Tensor, counts: Tensor) -> Tensor:
        """`ranked` [R, H, T] as it is for heads that keep `counts` [R, H] tokens; changes nothing."""
        return ranked

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        """Indices [R, H, K] of the places that stay, ascending; changes nothing.

        A mean of at most `budget` tokens for each KV head. Where a head keeps fewer than K, -1
        stands behind its own (ragged schedulers only).
        """
        return best_places(self.ranked(tokens, budget), budget)
