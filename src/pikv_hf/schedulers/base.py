"""Which tokens stay."""

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
class Tokens:
    """Candidates of R rows, T places for each of their H KV heads, oldest first.

    `positions` [R, H, T] int64: columns of the sequence, padding included, ascending. `keys`
    [R, H, T, D] are those that the cache holds: after their rotary embedding, or latents. `valid` [R, H, T]: which places hold a token, the
    last ones of each head; None = all. The oldest `sinks` tokens stay in any case. `seen`: tokens
    that layer `layer_idx` has ever been given, `padding` of them before the first of these rows.

    `open_keys` [R, H, n, D] are those of the newest n tokens, which stay in any case. Where
    keys are latents, `latent_rank` of their dims are the value, too. `queries` [R, H, G, m, D], asked with the factor `scale`, are those of the newest m tokens and of the G
    query heads of each KV head: as many as `observed_queries` of the scheduler, or fewer at first;
    zeros stand for padding. None if it asks for none.

    `record` [R, H, T, c]: the c numbers that the scheduler keeps of each token (`records`), after all
    queries so far; `constant` [R, H, T, c] those that never change (`constants`); `control` [R, c] those
    of each row (`controls`), as its last decision left them; None if it keeps none.

    What a scheduler `needs`, else None: `values` [R, H, T, Dv] and `open_values`, beside latents with
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
    record: Tensor | None = None
    constant: Tensor | None = None
    control: Tensor | None = None
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

    def asked_by_newest(self, count: int) -> "Tokens":
        """The same with the queries of at most `count` tokens, the newest."""
        if self.queries is None or not count:
            return self
        return replace(self, queries=self.queries[:, :, :, -count:])


class Scheduler(ABC):
    """Decides, whenever tokens leave the tail, which sealed and newly sealed tokens stay.

    A scheduler is a frozen dataclass: its own configuration, without run state.
    """

    #: Whether it must be given a file that was made for the model.
    needs_file: ClassVar[bool] = False

    def check(self, model: PreTrainedModel, layers: int) -> None:
        """Raise ValueError if it cannot serve `model`, of which `layers` layers are paged, as when its
        file is of another one. Called before a cache is attached."""
        return

    def tensors(self, layer_idx: int) -> Iterable[Tensor]:
        """What it holds for a layer: a part of the bytes of a cache."""
        return ()

    @property
    def is_ragged(self) -> bool:
        """Whether KV heads may keep different numbers of tokens."""
        return False

    @property
    def has_lengths(self) -> bool:
        """Whether KV heads have `lengths` of their own: a cache is given no budget."""
        return False

    def lengths(self, layer_idx: int, left: int, budget: int) -> Tensor:
        """Tokens [H] that each KV head of layer `layer_idx` may hold in pages.

        Of each head `left` tokens have left the tail; `budget` is the scheduler's own, without those
        that stay open. Only asked of schedulers that have lengths.
        """
        raise NotImplementedError(f"{type(self).__name__} has no lengths.")

    @property
    def is_per_head(self) -> bool:
        """Whether the scores of a KV head depend on nothing of the others."""
        return True

    @property
    def exceeds_budget(self) -> bool:
        """Whether some layers keep more than their share, on top of the budget."""
        return False

    @property
    def decides_by_scores(self) -> bool:
        """Whether a KV head keeps those of its highest `scores`, and what is `protected`: no more decides."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """What of `values`, `experts`, `output`, `module` and `rotary` it wants to find in `Tokens`; and
        `rerotate`, if kept keys are to close the gaps between them."""
        return frozenset()

    @property
    def observed_queries(self) -> int:
        """How many of a layer's newest tokens it wants the queries of; 0 = none."""
        return 0

    @property
    def least(self) -> int:
        """Sealed tokens that stay even if the open ones fill the budget."""
        return 0

    @property
    def records(self) -> int:
        """How many numbers are kept of each token, which every query may change; 0 = none."""
        return 0

    def recorded(self, record: Tensor, weights: Tensor, asked_at: Tensor) -> Tensor:
        """`record` [R, H, T, records] of tokens, zeros at first, after m more queries.

        `weights` [R, H, G, m, T]: how the queries of positions `asked_at` [m] attend to the tokens,
        in float32; zeros stand for padding. Changes nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no records.")

    @property
    def constants(self) -> int:
        """How many numbers are kept of each token that never change; 0 = none."""
        return 0

    @property
    def constant_needs(self) -> frozenset[str]:
        """What of `values`, `output` and `module` `constant` wants to find in `Tokens`."""
        return frozenset()

    def constant(self, tokens: Tokens) -> Tensor:
        """Those numbers [R, H, T, constants] of tokens that leave the tail. Changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} keeps no constants.")

    @property
    def controls(self) -> int:
        """How many numbers are kept of each row in each layer, for the next decision; 0 = none."""
        return 0

    def controlled(self, tokens: Tokens, keep: Tensor) -> Tensor:
        """The numbers [R, controls] after it was decided that `keep` stays; zeros at first."""
        raise NotImplementedError(f"{type(self).__name__} has no controls.")

    @property
    def repetition(self) -> Any:
        """How the model is to repeat what a cache held back, which marks tokens; None = not at all.

        With `prompt_ids`, `chunk_size`, `overlap` and `sinks` (KVzip). `Tokens.record` [R, H, T, 1]
        is then the largest attention that each token got, 0 if it was not repeated.
        """
        return None

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
        """[R, H, T] float; the highest stay, of equal ones the later. Changes nothing.

        Scores of places without a token are never read.
        """

    def protected(self, tokens: Tokens, budget: int) -> Tensor | None:
        """Places [T] that stay within `budget` whatever their scores; None = none. Changes nothing."""
        return None

    def ranked(self, tokens: Tokens, budget: int) -> Tensor:
        """`scores`, with sinks and protected tokens above all, places without a token below all."""
        scores, number = self.scores(tokens), tokens.number()
        if tokens.sinks:
            scores = scores.masked_fill((number >= 0) & (number < tokens.sinks), torch.inf)
        protected = self.protected(tokens, budget)
        if protected is not None:
            scores = scores.masked_fill(protected, torch.inf)
        return scores if tokens.valid is None else scores.masked_fill(number < 0, -torch.inf)

    def reranked(self, tokens: Tokens, ranked: Tensor, counts: Tensor) -> Tensor:
        """`ranked` [R, H, T] as it is for heads that keep `counts` [R, H] tokens; changes nothing."""
        return ranked

    def keep(self, tokens: Tokens, budget: int) -> Tensor:
        """Indices [R, H, K] of the places that stay, ascending; changes nothing.

        A mean of at most `budget` tokens for each KV head. Where a head keeps fewer than K, -1
        stands behind its own (ragged schedulers only).
        """
        return best_places(self.ranked(tokens, budget), budget)
