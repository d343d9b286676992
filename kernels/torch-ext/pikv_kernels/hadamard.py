"""An orthonormal rotation that spreads an outlier in one dim over many dims.

Multiplying queries and keys by the same orthonormal matrix leaves their products as they are.
"""

import functools

import torch
from torch import Tensor


def hadamard_block(dim: int) -> int:
    """Return the size of rotated blocks: the largest power of two that divides `dim`."""
    return dim & -dim


def hadamard(states: Tensor) -> Tensor:
    """Multiply the last dim by a block-diagonal orthonormal Hadamard matrix, its own inverse.

    Args:
        states: `[..., D]`, floating point. For an odd D this is the identity.
    """
    block = hadamard_block(states.shape[-1])
    if block <= 1:
        return states
    matrix = _matrix(block, states.dtype, states.device)
    if block == states.shape[-1]:
        return states @ matrix
    return (states.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def hadamard_reference(states: Tensor) -> Tensor:
    """Do the work of `hadamard` by sums and differences of pairs, log2(block) times."""
    dim = states.shape[-1]
    block, width = hadamard_block(dim), 1
    while width < block:
        first, second = states.reshape(*states.shape[:-1], -1, 2, width).unbind(-2)
        states = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        width *= 2
    return states / block**0.5 if block > 1 else states


@functools.lru_cache(maxsize=64)
def _matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made outside of inference mode, so that queries with gradients can be rotated later.
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < block:
            top, bottom = torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)
            matrix = torch.cat([top, bottom])
        return (matrix / block**0.5).to(device, dtype)
