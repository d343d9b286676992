"""Fit `pikv_quest` to one layer: predict from keys and values how much attention tokens will get.

Shapes: H KV heads, n queries per KV head, T tokens, D dims of key and value together,
m hidden units.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.rotary import Rotary
from ..schedulers.pikv_quest import Network, position_free, utility
from .capture import Capture, Window
from .descent import descent
from .projections import EXACT, Fit

HIDDEN = 32
RATE = 3e-3
MIN_SPREAD = 1e-4  # lower bound of a dim's standard deviation, as a share of its head's largest


def fit_utility(
    capture: Capture, rotary: Rotary, steps: int, seed: int, device: torch.device
) -> Fit:
    """Train the networks of the layer of `capture`, for at most `steps` steps of one window each.

    The loss is the divergence (Kullback-Leibler, in nats) of the softmax of u over the tokens of a
    window from the mean attention of its queries to them. The newest eighth of the tokens stands
    for a cache's tail and is left out. Before training u is 0, so `Fit.before` is the loss of equal
    shares. The networks with the smallest loss on the held-out windows are returned.

    Memory: the windows of the layer in float32.
    """
    fitting = Fitting(capture, rotary, seed, device)
    judged = fitting.network, fitting.held_out_loss
    best, before, after = descent([*fitting.free.values()], fitting.loss, *judged, steps, RATE)
    return Fit({part: tensor.cpu() for part, tensor in best.items()}, before, after)


class Fitting:
    """The fit of one layer, with each dim of keys and values scaled to mean 0 and variance 1."""

    def __init__(self, capture: Capture, rotary: Rotary, seed: int, device: torch.device) -> None:
        def examples(windows: Sequence[Window]) -> list[tuple[Tensor, Tensor]]:
            return [_example(window, capture.scale, rotary, device) for window in windows]

        self.fitted, self.held_out = examples(capture.fitted), examples(capture.held_out)
        states = [states for states, _ in self.fitted]
        self.mean = torch.stack([s.mean(1) for s in states]).mean(0)  # [H, D]
        squares = [(s - self.mean[:, None]).square().mean(1) for s in states]
        spread = torch.stack(squares).mean(0).sqrt()
        min_spread = MIN_SPREAD * spread.amax(-1, keepdim=True)
        self.spread = spread.maximum(min_spread).clamp_min(torch.finfo(torch.float32).tiny)
        heads, dims = self.mean.shape
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(heads, dims, HIDDEN, generator=generator) / math.sqrt(dims)
        empty = torch.zeros(heads, HIDDEN, device=device)
        self.free: Network = {"hidden": hidden.to(device), "bias": empty, "out": empty.clone()}
        self.order = random.Random(seed)

    def network(self) -> Network:
        """Return the current networks for unscaled states; gradients flow to `free`."""
        hidden = self.free["hidden"] / self.spread[..., None]
        bias = self.free["bias"] - (self.mean[:, None] @ hidden).squeeze(1)
        return {"hidden": hidden, "bias": bias, "out": self.free["out"].clone()}

    def loss(self) -> Tensor:
        """Return the loss in the next window; the order of windows depends on the seed only."""
        return divergence(*self.order.choice(self.fitted), self.network())

    @torch.no_grad()
    def held_out_loss(self, network: Network) -> float:
        losses = [divergence(*example, network).item() for example in self.held_out]
        return sum(losses) / len(losses)


@torch.no_grad()
def _example(
    window: Window, scale: float, rotary: Rotary, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the states [H, T, D] and attention shares [H, T] of a window's tokens.

    The newest tokens are left out; the shares of the others sum to 1.
    """
    query, keys, values = (states.to(device, torch.float32) for states in window)
    old = keys.shape[1] - keys.shape[1] // EXACT
    shares = (query @ keys.mT * scale).softmax(-1).mean(1)[:, :old]
    states = position_free(keys, values, torch.arange(keys.shape[1], device=device), rotary)
    return states[:, :old], shares / shares.sum(-1, keepdim=True)


def divergence(states: Tensor, shares: Tensor, network: Network) -> Tensor:
    """Return KL(`shares` [H, T] || softmax of u of `states` [H, T, D]), the mean over heads."""
    predicted = utility(states, network).log_softmax(-1)
    return torch.nn.functional.kl_div(predicted, shares, reduction="none").sum(-1).mean()
