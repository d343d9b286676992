from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_flag, check_whole
from .base import Candidates, Needs, Scheduler

# Candidates that are scaled in float32 at a time.
BLOCK = 1024


@dataclass(frozen=True)
class LagKV(Scheduler):
    """Keeps tokens that stand out from the tokens after them (arXiv 2504.04704, section 2.2).

    After the first `sinks` tokens the sequence, tail tokens included, is cut into partitions of
    `lag_size`. Each dim of keys and values is scaled by its minimum and maximum in the next
    partition. The score of a token is the standard deviation over its dims, as a softmax over its
    partition, averaged over keys and values. Each partition keeps an equal share of its tokens; the
    last full one, and tokens after it, stay. Latents (MLA) count as keys. Needs no queries.

    Args:
        sinks: first tokens kept, >= 0.
        lag_size: tokens of a partition, > 1.
        cross_scoring: compare scores between all partitions, instead of ranks within each.
    """

    sinks: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("sinks", 0), ("lag_size", 2)):
            check_whole(name, getattr(self, name), minimum)
        check_flag("cross_scoring", self.cross_scoring)

    @property
    def needs(self) -> Needs:
        return Needs(inputs=frozenset({"values"}), sinks=self.sinks)

    def scores(self, tokens: Candidates) -> Tensor:
        number = tokens.number().expand(tokens.keys.shape[:3])
        states = [torch.cat([tokens.keys, tokens.open_keys], dim=2)]
        assert tokens.values is not None and tokens.open_values is not None, "they are the needs"
        if tokens.values.shape[-1]:
            states.append(torch.cat([tokens.values, tokens.open_values], dim=2))
        length = states[0].shape[2]
        at = torch.arange(length, device=number.device)
        held = number.amax(-1, keepdim=True) + 1
        if tokens.valid is not None:  # shift each head so that its oldest token is first
            missing = tokens.keys.shape[2] - held
            index = (at + missing).clamp_max(length - 1)[..., None]
            states = [t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in states]
        information = torch.stack([self._information(t) for t in states]).mean(0)
        if not self.cross_scoring:
            ranks = information.argsort(dim=-1, stable=True).argsort(dim=-1)
            information = ranks / self.lag_size
        scores = information.new_ones(*number.shape[:2], length)
        scores[..., self.sinks :][..., : information[0, 0].numel()] = information.flatten(2)
        total = held + length - tokens.keys.shape[2]
        partitions = (total - self.sinks).div(self.lag_size, rounding_mode="floor")
        newest = at >= self.sinks + (partitions - 1).clamp_min(0) * self.lag_size
        scores = torch.where(newest, 1 + at / length, scores)
        scores = scores.masked_fill(at < self.sinks, torch.inf)
        return scores.gather(-1, number.clamp_min(0))

    def _information(self, states: Tensor) -> Tensor:
        """Score all but the last of N full partitions of [R, H, T, D]: [R, H, N - 1, lag_size]."""
        lag = self.lag_size
        full = (states.shape[2] - self.sinks) // lag
        if full < 2:
            return states.new_zeros(*states.shape[:2], 0, lag, dtype=torch.float32)
        parts = states[:, :, self.sinks : self.sinks + full * lag].unflatten(2, (full, lag))
        low, high = (part.float() for part in parts[:, :, 1:].aminmax(dim=3, keepdim=True))
        width = high - low
        step = max(BLOCK // lag, 1)
        blocks = (t.split(step, dim=2) for t in (parts[:, :, :-1], low, width))
        deviations = [
            torch.where(size > 0, (part.float() - base) / size, 0.0).std(dim=-1)
            for part, base, size in zip(*blocks, strict=True)
        ]
        return torch.cat(deviations, dim=2).softmax(dim=-1)
