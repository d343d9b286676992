import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Candidates, Needs, Scheduler
from .keydiff import KeyDiff
from .wrapper import Wrapper

TERMS = ("spread", "confidence", "popularity", "agreement")


@dataclass(frozen=True)
class Expert(Wrapper):
    """What the model's gate says of a token, beside another scheduler's scores (PiKV's own).

    The score is the weighted sum of ranks: for each KV head the share of its candidates that are
    lower, by the scorer and by each term, ties in the middle. So no scale matters, and a term of
    weight 0 is not asked. The terms of a token, with shares p, the weights of its k experts over
    their sum:

    - spread: the entropy of p. Always 0 with one expert a token.
    - confidence: the largest weight as the gate gave it. With two experts whose weights add up to 1
      its order is that of the spread, reversed.
    - popularity: how often its experts are chosen among the candidates, the mean by p.
    - agreement: the same among the open tokens, the newest, each expert counted by its share there.

    By default tokens stay whose experts the newest ones do not use: what helped on the bundled model
    (docs/benchmarks), where the other terms did little, or harm. Another model may want another sign.

    A layer without a gate keeps what the scorer says. What it keeps in any case (its sinks) stays,
    unless its ranks do not count.

    Args:
        scorer: whose scores count, too.
        weight: of the scorer's ranks; 0 = the terms alone.
        spread, confidence, popularity, agreement: weights of the terms; negative ones turn them round.
    """

    scorer: Scheduler = field(default_factory=KeyDiff)
    weight: float = 1.0
    spread: float = 0.0
    confidence: float = 0.0
    popularity: float = 0.0
    agreement: float = -0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer.traits.is_ragged or not self.scorer.traits.decides_by_scores:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, in which not the scores alone decide: put it around, as "
                "in AdaKV(Expert(SnapKV()))."
            )
        for name in ("weight", *TERMS):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"`{name}` is {value!r}; it must be a number.")
            if not math.isfinite(value):
                raise ValueError(f"`{name}` is {value!r}; it must be a number.")
        if not self.weight >= 0:
            raise ValueError(f"`weight` is {self.weight!r}; it must be 0 or more.")

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(inputs=frozenset({"experts"}))

    def protected(self, tokens: Candidates, budget: int) -> Tensor | None:
        return super().protected(tokens, budget) if self.weight else None

    def scores(self, tokens: Candidates) -> Tensor:
        terms = {name: getattr(self, name) for name in TERMS if getattr(self, name)}
        if tokens.experts is None or not terms:
            return self.scorer.scores(tokens)
        shape = tokens.keys.shape[:3]
        total = torch.zeros(shape, device=tokens.keys.device)
        stays = None
        if self.weight:
            scores = self.scorer.scores(tokens)
            total += self.weight * ranks(scores, tokens.valid)
            stays = scores == torch.inf
        for name, weight in terms.items():
            total += weight * ranks(expert_term(name, tokens), tokens.valid)
        return total if stays is None else total.masked_fill(stays, torch.inf)


def expert_term(name: str, tokens: Candidates) -> Tensor:
    """A term of `Expert` for each candidate, [R, 1 or H, T] in float32."""
    experts, weights = tokens.experts, tokens.weights
    assert experts is not None and weights is not None
    if name == "confidence":
        return weights.float().amax(-1)
    own = shares(weights)
    if name == "spread":
        return torch.special.entr(own).sum(-1)
    experts = experts.long()
    if name == "popularity":
        chosen, counted, valid = experts, torch.ones_like(own), tokens.valid
    else:
        assert tokens.open_experts is not None and tokens.open_weights is not None
        chosen, counted, valid = tokens.open_experts.long(), shares(tokens.open_weights), None
    if valid is not None:
        counted = counted * valid[..., None]
        chosen = chosen.expand(counted.shape)
    most = torch.cat([experts.flatten(), chosen.flatten()]).max()
    load = own.new_zeros(*chosen.shape[:2], int(most) + 1)
    load.scatter_add_(2, chosen.flatten(2), counted.flatten(2))
    heads = max(load.shape[1], experts.shape[1])
    load, index = (t.expand(-1, heads, -1) for t in (load, experts.flatten(2)))
    return (load.gather(2, index).unflatten(2, own.shape[2:]) * own).sum(-1)


def shares(weights: Tensor) -> Tensor:
    """`weights` [..., k] of a gate over their sum; equal ones where there is nothing to divide."""
    positive = weights.float().clamp_min(0)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / total, 1 / weights.shape[-1])


def ranks(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Which share of the tokens of its head is lower, [R, H, T]; of equal ones half are."""
    if valid is not None:
        scores = scores.expand(valid.shape).masked_fill(~valid, -torch.inf)
    scores = scores.contiguous()
    ascending = scores.sort(dim=-1).values
    lower = torch.searchsorted(ascending, scores)
    not_higher = torch.searchsorted(ascending, scores, right=True)
    middle = (lower + not_higher).float() / 2
    if valid is None:
        return middle / scores.shape[-1]
    held = valid.sum(-1, keepdim=True)
    return (middle - (scores.shape[-1] - held)) / held.clamp_min(1)
