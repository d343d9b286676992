"""Gathering of tokens with one index for each token, and of pages."""

import math

import torch
from torch import Tensor

from .memory import empty_like


def taken(tensor: Tensor, keep: Tensor) -> Tensor:
    """Gather tokens `keep` [R, H, K] of `tensor` [R or 1, H or 1, T, ...]: dense [R, H, K, ...].

    `torch.gather` would read an index for every number; this function reads one index per token.
    """
    tensor = tensor.expand(*keep.shape[:2], *tensor.shape[2:])
    shape, width = (*keep.shape, *tensor.shape[3:]), math.prod(tensor.shape[3:])
    if math.prod(shape) == 0:
        return tensor.new_empty(shape)
    if tensor.device.type != "cpu":  # one kernel, whose repeated indices come from a cache
        index = keep.view(*keep.shape, *(1 for _ in tensor.shape[3:])).expand(shape)
        return torch.gather(tensor, 2, index)
    if not tensor[0, 0, 0].is_contiguous() or any(s % width for s in tensor.stride()[:3]):
        tensor = tensor.contiguous()
    steps = [stride // width for stride in tensor.stride()[:3]]
    last = sum((n - 1) * step for n, step in zip(tensor.shape, steps, strict=False))
    tokens = tensor.as_strided((last + 1, width), (width, 1))
    row, head = (torch.arange(n, device=keep.device) for n in keep.shape[:2])
    index = keep * steps[2] + (row[:, None] * steps[0] + head * steps[1])[..., None]
    out = empty_like(tensor, shape)
    torch.index_select(tokens, 0, index.flatten(), out=out.view(-1, width))
    return out


def select_pages(pages: Tensor, places: Tensor) -> Tensor:
    """Copy the pages `places` [n, H, K] of `pages` [N, ...], in the memory of `pages`."""
    index = places.flatten().to(pages.device)
    if pages.device.type != "cpu":
        return pages.index_select(0, index).unflatten(0, places.shape)
    out = empty_like(pages, (index.numel(), *pages.shape[1:]))
    return torch.index_select(pages, 0, index, out=out).view(*places.shape, *pages.shape[1:])
