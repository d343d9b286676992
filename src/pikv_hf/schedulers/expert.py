import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.gates import shares
from .base import Candidates, Needs, Scheduler
from .keydiff import KeyDiff
from .wrapper import Wrapper

TERMS = ("spread", "confidence", "popularity", "agreement")


@dataclass(frozen=True)
class Expert(Wrapper):
    """Adds terms of the model's gate to the scores of another scheduler (PiKV's own).

    The score of a token is a weighted sum of its ranks by the scorer and by each term, so that
    scales do not matter. A rank is the share of the KV head's candidates that are lower; ties count
    half. With p, the weights of a token's k experts over their sum, the terms are:

    - spread: the entropy of p. Always 0 with one expert a token.
    - confidence: the largest weight as the gate gave it. With two experts whose weights add up to
      1 it orders tokens as the spread does, reversed.
    - popularity: how many candidates chose an expert, averaged over the token's experts by p.
    - agreement: how many tail tokens chose an expert, each counted by its own p, averaged over the
      token's experts by p.

    By default tokens are kept whose experts the tail tokens do not use. This term helped on the
    bundled model (docs/benchmarks), the other terms did little, or harm. Another model may need
    another sign. A layer without a gate uses the scorer alone. Tokens of infinite score, such as
    the scorer's sinks, are kept unless `weight` is 0.

    Args:
        scorer: scheduler whose scores are added to.
        weight: weight of the scorer's ranks; 0 = the terms alone.
        spread, confidence, popularity, agreement: weights of the terms; a negative one reverses it.
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
                f"`scorer` is {self.scorer!r}, which decides by more than scores: put it "
                "outside, as in AdaKV(Expert(SnapKV()))."
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
        is_infinite = None
        if self.weight:
            scores = self.scorer.scores(tokens)
            total += self.weight * ranks(scores, tokens.valid)
            is_infinite = scores == torch.inf
        for name, weight in terms.items():
            total += weight * ranks(expert_term(name, tokens), tokens.valid)
        return total if is_infinite is None else total.masked_fill(is_infinite, torch.inf)


def expert_term(name: str, tokens: Candidates) -> Tensor:
    """Return a term of `Expert` for each candidate: [R, 1 or H, T] float32."""
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
    max_expert = torch.cat([experts.flatten(), chosen.flatten()]).max()
    load = own.new_zeros(*chosen.shape[:2], int(max_expert) + 1)
    load.scatter_add_(2, chosen.flatten(2), counted.flatten(2))
    heads = max(load.shape[1], experts.shape[1])
    load, index = (t.expand(-1, heads, -1) for t in (load, experts.flatten(2)))
    return (load.gather(2, index).unflatten(2, own.shape[2:]) * own).sum(-1)


def ranks(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Return the share [R, H, T] of tokens of the head that score lower; equals count half."""
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
