"""Tokens taken out of a tensor, each row of it read once."""

import math

import torch
from torch import Tensor

from .memory import empty_like


def taken(tensor: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """Of `tensor` [R or 1, H or 1, T, ...] the tokens `keep` [R, H, K]: [R, H, K, ...], dense.

    `gather` would read an index for every number; this one reads one for each token, whatever the
    strides. The result is `out`, if that is given.
    """
    tensor = tensor.expand(*keep.shape[:2], *tensor.shape[2:])
    shape, width = (*keep.shape, *tensor.shape[3:]), math.prod(tensor.shape[3:])
    if math.prod(shape) == 0:
        return tensor.new_empty(shape)
    if not tensor[0, 0, 0].is_contiguous() or any(s % width for s in tensor.stride()[:3]):
        tensor = tensor.contiguous()
    steps = [stride // width for stride in tensor.stride()[:3]]
    last = sum((n - 1) * step for n, step in zip(tensor.shape, steps, strict=False))
    tokens = tensor.as_strided((last + 1, width), (width, 1))
    row, head = (torch.arange(n, device=keep.device) for n in keep.shape[:2])
    index = keep * steps[2] + (row[:, None] * steps[0] + head * steps[1])[..., None]
    out = empty_like(tensor, shape) if out is None else out
    torch.index_select(tokens, 0, index.flatten(), out=out.view(-1, width))
    return out
