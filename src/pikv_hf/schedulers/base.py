"""The base class of schedulers, and what a cache and a scheduler tell each other."""

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
    """The tokens that a scheduler chooses from, oldest first, and what it may read of its layer.

    Shapes: R rows, H KV heads, T places in each head, D key dim, Dv value dim. The n tail tokens
    (`open_...`) are no candidates: they are always kept. Inputs that `needs` leaves out are None.

    Attributes:
        positions: [R, H, T] int64, ascending: how many tokens of the row are before each one.
        keys: [R, H, T, D] as the cache holds them: after their rotary embedding, or latents.
        values, open_values: [R, H, T, Dv] and [R, H, n, Dv]; Dv = 0 beside latents.
        open_keys: [R, H, n, D] of the tail tokens, which are the newest.
        seen: number of tokens of each row that layer `layer_idx` has read, evicted ones included.
        queries: [R, H, G, m, D] of the newest m tokens and the G query heads of each KV head: as
            many as the scheduler needs, or fewer at first.
        scale: factor of the products of queries and keys.
        statistics: [R, H, T, c] numbers of each token, after all queries so far.
        constants: [R, H, T, c] numbers of each token that never change.
        row_state: [R, c] numbers of each row, as the last decision left them.
        valid: [R, H, T], True where a place holds a token, the last ones of each head; None = all.
        sinks: oldest tokens of each row that are kept in any case.
        latent_rank: if keys are latents, the number of their dims that are the value, too.
        experts, weights: [R, 1 or H, T, k], the choice of the model's gate; None without a gate.
        open_experts, open_weights: [R, 1, n, k], the same choice for the tail tokens.
        output, module: weight [hidden, Hq * Dv] of the output projection; the attention module.
        rotary: rotation of keys and queries by position.
        notes: what earlier layers left for later ones; empty at the first layer of a forward pass.
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
        """Return ages [R or 1, H or 1, T] of places: rank in their head, 0 = oldest; -1 = empty."""
        if self.valid is None:
            return torch.arange(self.keys.shape[2], device=self.keys.device)[None, None]
        return self.valid.cumsum(-1).masked_fill(~self.valid, 0) - 1

    def with_newest_queries(self, count: int) -> Candidates:
        """Return these candidates with the queries of the newest `count` tokens; 0 = of all."""
        if self.queries is None or not count:
            return self
        return replace(self, queries=self.queries[:, :, :, -count:])


class TokenStatistics(ABC):
    """Numbers kept with each token that every later query may change."""

    @property
    @abstractmethod
    def num_statistics(self) -> int:
        """Numbers of each token."""

    @abstractmethod
    def updated(self, statistics: Tensor, weights: Tensor, query_positions: Tensor) -> Tensor:
        """Return `statistics` [R, H, T, n], which begin as zeros, after m more queries.

        `weights` [R, H, G, m, T] float32: attention of m queries to the tokens, zeros at padding.
        `query_positions` [R or 1, m] are the positions of the queries. Changes nothing.
        """


class TokenConstants(ABC):
    """Numbers computed once for each token, when it leaves the tail, and kept with it."""

    #: Numbers of each token.
    num_constants: ClassVar[int] = 1

    #: The fields among `values`, `output` and `module` that `constants` reads of the candidates.
    constant_inputs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def constants(self, tokens: Candidates) -> Tensor:
        """Return the numbers [R, H, T, n] of tokens that leave the tail. Changes nothing."""


class RowState(ABC):
    """Numbers kept for each row of a layer from one decision to the next."""

    #: Numbers of each row.
    num_row_state: ClassVar[int] = 1

    @abstractmethod
    def next_row_state(self, tokens: Candidates, keep: Tensor) -> Tensor:
        """Return the numbers [R, n], zeros at first, after the decision to keep `keep`."""


@dataclass(frozen=True)
class Needs:
    """The inputs of a scheduler. The cache reads them once, and fills `Candidates` accordingly.

    Args:
        queries: number of newest tokens whose queries the cache keeps.
        inputs: fields to fill, among `values`, `experts`, `output`, `module` and `rotary`; and
            `rerotate`, if kept keys are to close the gaps between them.
        sinks: first tokens of each row that are kept even if the tail fills the budget.
        statistics: numbers of each token that queries change, and how.
        constants: numbers of each token that never change, and how to compute them.
        row_state: numbers of each row, and how a decision changes them.
        repetition: how the model repeats a text that the cache held back: an object with
            `prompt_ids`, `chunk_size`, `overlap` and `sinks` (KVzip). The statistics [R, H, T, 1]
            are then the largest attention that each token got, 0 if it was not repeated.
    """

    queries: int = 0
    inputs: frozenset[str] = frozenset()
    sinks: int = 0
    statistics: TokenStatistics | None = None
    constants: TokenConstants | None = None
    row_state: RowState | None = None
    repetition: Any = None

    def __or__(self, other: Needs) -> Needs:
        """Return the combined needs; if both compute a kind of number, `other`'s way is used."""
        return Needs(
            queries=max(self.queries, other.queries),
            inputs=self.inputs | other.inputs,
            sinks=max(self.sinks, other.sinks),
            **{
                name: own if (own := getattr(other, name)) is not None else getattr(self, name)
                for name in ("statistics", "constants", "row_state", "repetition")
            },
        )


@dataclass(frozen=True)
class Traits:
    """The properties of a scheduler's choice that the cache and other schedulers must know.

    Args:
        is_ragged: KV heads may keep different numbers of tokens.
        is_per_head: the scores of a KV head do not depend on other heads.
        decides_by_scores: a KV head keeps its highest scores and `protected` tokens, nothing else.
        exceeds_budget: some layers keep more than their share, on top of the budget.
        has_lengths: KV heads have `lengths` of their own; a cache is given no budget.
        numbers_heads: the scores of a KV head depend on its number in the layer.
        links_layers: the choice of a layer depends on other layers, or on its number among them.
    """

    is_ragged: bool = False
    is_per_head: bool = True
    decides_by_scores: bool = True
    exceeds_budget: bool = False
    has_lengths: bool = False
    numbers_heads: bool = False
    links_layers: bool = False

    @property
    def is_splittable(self) -> bool:
        """True if some of a layer's KV heads alone keep what they keep among all."""
        return self.is_per_head and not self.is_ragged and not self.numbers_heads


class Scheduler(ABC):
    """Chooses which tokens to keep among all that have left the tail, whenever more leave it.

    A scheduler is a frozen dataclass: its configuration, and weights that it reads from a file when
    it is made. Run state lives in the layer: `statistics`, `constants` and `row_state` of the
    candidates. (`fitting.HeadEffect` measures heads for `pikv profile`, and holds its own sums.) A
    subclass defines `scores`, and `needs` if scores read more than keys and positions; everything
    else has a default. Its methods change nothing, except that `scores` may write to `notes`.
    """

    #: True if it must be given a file that was made for the model.
    needs_file: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """Inputs that the cache has to provide."""
        return Needs()

    @property
    def traits(self) -> Traits:
        """Properties of the choice that the cache must know."""
        return Traits()

    def check(self, model: PreTrainedModel, layers: int) -> None:
        """Check, before a cache is attached, `model`, of which `layers` layers are paged.

        Raises:
            ValueError: the scheduler cannot serve it; its file may be for another model.
        """
        return

    def tensors(self, layer_idx: int) -> Iterable[Tensor]:
        """Return the scheduler's tensors for a layer, which count as bytes of the cache."""
        return ()

    def lengths(self, layer_idx: int, left: int, budget: int) -> Tensor:
        """Return the numbers [H] of tokens that KV heads of layer `layer_idx` may hold in pages.

        `left` tokens of each head have left the tail; `budget` is the scheduler's own, less the
        tail tokens. Called only if `traits.has_lengths`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no lengths.")

    def budget(self, seen: int) -> int | None:
        """Return the tokens to hold per row and KV head after `seen` tokens, the tail included.

        None: the scheduler has no budget of its own, so that the cache must be given one.
        """
        return None

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        """Return how many tokens paged layer `layer` of `layers` may hold in pages.

        `budget` is the mean over the layers, `available` the tokens that have left the tail.
        """
        return budget

    @abstractmethod
    def scores(self, tokens: Candidates) -> Tensor:
        """Return scores [R, H, T]. The highest are kept; of equal scores, the later tokens.

        Scores of places without a token are never read.
        """

    def protected(self, tokens: Candidates, budget: int) -> Tensor | None:
        """Return True at places [T] to keep within `budget` whatever their scores; None = none."""
        return None

    def ranked(self, tokens: Candidates, budget: int) -> Tensor:
        """Return `scores`, but inf at sinks and protected tokens, -inf at empty places."""
        scores, number = self.scores(tokens), tokens.number()
        if tokens.sinks:
            scores = scores.masked_fill((number >= 0) & (number < tokens.sinks), torch.inf)
        protected = self.protected(tokens, budget)
        if protected is not None:
            scores = scores.masked_fill(protected, torch.inf)
        return scores if tokens.valid is None else scores.masked_fill(number < 0, -torch.inf)

    def reranked(self, tokens: Candidates, ranked: Tensor, counts: Tensor) -> Tensor:
        """Return `ranked` [R, H, T], adapted to heads that keep `counts` [R, H] tokens."""
        return ranked

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        """Return the indices [R, H, K] of the places to keep, ascending.

        KV heads keep at most `budget` tokens on average, unless they have `lengths`. If a ragged
        scheduler keeps fewer than K tokens of a head, the last indices of that head are -1.
        """
        return best_places(self.ranked(tokens, budget), budget)
