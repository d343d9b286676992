"""Training of calibrated methods by gradient descent."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

CHECKS = 10
Result = TypeVar("Result")


def descent(
    weights: Sequence[Tensor],
    loss: Callable[[], Tensor],
    read: Callable[[], Result],
    error: Callable[[Result], float],
    steps: int,
    rate: float,
    max_norm: float = math.inf,
) -> tuple[Result, float, float]:
    """Minimize `loss`, which is called in each step, by Adam with a cosine rate that falls to 0.

    Changes `weights` in place. Gradients are clipped to a norm of `max_norm`. About `CHECKS`
    times, the last time at the end, `error` judges what `read` makes of the weights.

    Returns:
        What `read` has returned with the smallest error: before training, if it does not help;
        the error before training; the smallest error.
    """
    best = read()
    before = after = error(best)
    weights = [tensor.requires_grad_() for tensor in weights]
    optimizer = torch.optim.Adam(weights, lr=rate)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        if max_norm < math.inf:
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        optimizer.step()
        if step % max(steps // CHECKS, 1) == 0 or step == steps:
            with torch.no_grad():
                result = read()
            if (found := error(result)) < after:
                best, after = result, found
    return best, before, after
