"""Fit the projections of one layer: principal axes, then gradient steps on attention output.

Shapes: H KV heads, n queries per KV head, T tokens, r rank, D key dim, Dv value dim.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressors import LowRank
from ..compressors.lowrank import Factors
from .capture import Capture, Window
from .descent import descent

EXACT = 8  # the newest eighth of a window stands for a cache's tail, which is not compressed
RATE = 1e-2


@dataclass(frozen=True)
class Fit:
    """Factors of one layer, and the relative errors of its attention output on held-out windows.

    `before` is the error of the untrained factors (principal axes), `after` the error of `factors`,
    which were chosen by their error on these windows.
    """

    factors: Factors
    before: float
    after: float


def fit(
    method: type[LowRank],
    capture: Capture,
    rank: int | None,
    steps: int,
    seed: int,
    device: torch.device,
) -> Fit:
    """Fit factors of `method` to the layer of `capture`, with at most `steps` training steps.

    `rank` None is a quarter of the head dim. The factors with the smallest error on the held-out
    windows are returned: the principal axes, if training does not help.
    """
    fitting = Fitting(method, capture, rank, seed, device)
    weights = [t for free in fitting.free.values() for t in free.values()]
    judged = fitting.factors, fitting.held_out_error
    best, before, after = descent(weights, fitting.loss, *judged, steps, RATE, max_norm=1.0)
    return Fit(fitting.finished(best), before, after)


class Fitting:
    """The fit of one layer, with keys and values scaled to a root mean square of 1."""

    def __init__(
        self,
        method: type[LowRank],
        capture: Capture,
        rank: int | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.method, self.scale, self.device = method, capture.scale, device
        self.moments = {"key": capture.keys, "value": capture.values}
        if capture.values.first.shape[-1] == 0:  # latents
            del self.moments["value"]
        generator = torch.Generator().manual_seed(seed)
        self.sizes, self.free = {}, {}
        for name, moments in self.moments.items():
            dim = moments.first.shape[-1]
            size = moments.size.clamp_min(torch.finfo(torch.float32).tiny)
            kept = max(dim // 4, 1) if rank is None else min(rank, dim)
            free = method.initial(moments.times(1 / size), kept, generator)
            self.sizes[name] = size.float()
            self.free[name] = {part: t.to(device) for part, t in free.items()}
        self.fitted, self.held_out = capture.fitted, capture.held_out
        self.order = random.Random(seed)

    def factors(self) -> dict[str, Factors]:
        """Return copies of the current factors, which later training steps do not change."""
        now = {n: {p: t.clone() for p, t in free.items()} for n, free in self.free.items()}
        return {name: self.method.constrained(free) for name, free in now.items()}

    def finished(self, factors: dict[str, Factors]) -> Factors:
        """Return factors for unscaled keys and values, as `LowRank.with_factors` takes them."""
        done: Factors = {}
        for name, parts in factors.items():
            scaled = self.method.rescaled(parts, self.sizes[name].to(self.device))
            done |= {f"{name}_{part}": t.detach().cpu() for part, t in scaled.items()}
        return {name: tensor.contiguous() for name, tensor in done.items()}

    def loss(self) -> Tensor:
        """Return the relative squared error of attention in the next window.

        The order of the windows depends on the seed only.
        """
        change, size = self._errors(self.order.choice(self.fitted), self.factors())
        return (change / size).mean()

    @torch.no_grad()
    def held_out_error(self, factors: dict[str, Factors]) -> float:
        """Return the norm of the change of the attention output, divided by the output's norm."""
        changes, sizes = zip(*(self._errors(w, factors) for w in self.held_out), strict=True)
        return math.sqrt(sum(map(torch.sum, changes)) / sum(map(torch.sum, sizes)))

    def _errors(self, window: Window, factors: dict[str, Factors]) -> tuple[Tensor, Tensor]:
        """Return the squared change [H] of the attention output and its squared norm [H]."""
        query, keys, values = (t.to(self.device, torch.float32) for t in window)
        size = self.sizes["key"].to(self.device)[:, None, None]
        query, keys = query * size, keys / size
        is_latent = "value" not in factors
        if not is_latent:
            values = values / self.sizes["value"].to(self.device)[:, None, None]
        near_keys = self._restored(keys, factors["key"])
        near_values = near_keys if is_latent else self._restored(values, factors["value"])
        with torch.no_grad():
            exact = _attention(query, keys, keys if is_latent else values, self.scale)
        change = _attention(query, near_keys, near_values, self.scale) - exact
        return change.square().sum((1, 2)), exact.square().sum((1, 2))

    def _restored(self, states: Tensor, factors: Factors) -> Tensor:
        """Return `states` [H, T, D] as a cache would read them, with the newest uncompressed."""
        sealed = states.shape[1] - states.shape[1] // EXACT
        near = self.method.restored(states[:, :sealed] @ factors["down"], factors)
        return torch.cat([near, states[:, sealed:]], dim=1)


def _attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return (query @ keys.mT * scale).softmax(-1) @ values


def mean_errors(fits: Sequence[Fit]) -> tuple[float, float]:
    """Return the root mean squares over layers of the errors before and after training."""
    before, after = ([getattr(f, name) ** 2 for f in fits] for name in ("before", "after"))
    return math.sqrt(sum(before) / len(fits)), math.sqrt(sum(after) / len(fits))
