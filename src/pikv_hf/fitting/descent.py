"""How calibrated parts are trained."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHECKS = 10


def descent(
    weights: Sequence[Tensor],
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    most_norm: float = math.inf,
) -> Iterator[None]:
    """Adam on `loss`, which each step asks anew, with a rate that falls to 0 as a cosine.

    Changes `weights` in place, by gradients of a norm of at most `most_norm`; yields about `CHECKS`
    times on the way, and at the end.
    """
    weights = [tensor.requires_grad_() for tensor in weights]
    optimizer = torch.optim.Adam(weights, lr=rate)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        if most_norm < math.inf:
            torch.nn.utils.clip_grad_norm_(weights, most_norm)
        optimizer.step()
        if step % max(steps // CHECKS, 1) == 0 or step == steps:
            yield
