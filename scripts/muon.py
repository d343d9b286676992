"""The Muon optimizer (Jordan et al., 2024), also for stacks of matrices such as experts."""

from __future__ import annotations

import math

import torch


class Muon(torch.optim.Optimizer):
    """Steps along the momentum of each matrix, made orthogonal.

    A group names in `parts` how many matrices lie on top of each other in one parameter.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.95).add_(parameter.grad)
                update = parameter.grad.add(momentum, alpha=0.95)
                parts = group["parts"]  # gate and up lie in one tensor but are two matrices
                matrices = update.unflatten(-2, (parts, update.shape[-2] // parts))
                update = orthogonal(matrices).reshape(update.shape)
                parameter.sub_(update, alpha=group["lr"])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    scale = math.sqrt(max(1.0, matrices.shape[-2] / matrices.shape[-1]))
    return scale * (x.mT if tall else x)
