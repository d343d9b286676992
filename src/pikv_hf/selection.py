"""The best of many tokens, and their rows out of a tensor: without a sort, each row read once."""

import math

import torch
from torch import Tensor

from .memory import empty_like


def best_places(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the highest `scores` [..., T], of equal ones the later; ascending."""
    count = min(count, scores.shape[-1])
    return _ascending(mask_of_best(scores, count), count).unflatten(0, scores.shape[:-1])


def best_of_each_head(scores: Tensor, counts: Tensor) -> Tensor:
    """The same with `counts` [...] of them, [..., K] with K the largest count; -1 behind the others."""
    width = int(counts.max())
    mask = mask_of_best(scores, counts)
    absent = torch.arange(width, device=counts.device) >= counts[..., None]
    # Places behind all tokens stand for those that are missing.
    chosen = torch.cat([mask, torch.arange(width, device=counts.device) < absent.sum(-1, True)], -1)
    return _ascending(chosen, width).unflatten(0, counts.shape).masked_fill(absent, -1)


def mask_of_best(scores: Tensor, counts: int | Tensor) -> Tensor:
    """Whether each of `scores` [..., T] is among the `counts` (int or [...]) highest of its row.

    Of equal ones the later are. NaN is as high as infinity.
    """
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    if isinstance(counts, Tensor):
        counts = counts[..., None]
        best = scores.topk(max(int(counts.max()), 1), dim=-1).values
        least = best.gather(-1, (counts - 1).clamp_min(0))
    elif counts == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    else:
        least = scores.kthvalue(scores.shape[-1] - counts + 1, dim=-1, keepdim=True).values
    above, equal = scores > least, scores == least
    missing = counts - above.sum(-1, keepdim=True)
    newer = equal.flip(-1).cumsum(-1).flip(-1)
    return above | (equal & (newer <= missing))


def _ascending(mask: Tensor, count: int) -> Tensor:
    """Columns [n, count] of the True ones of `mask` [..., T], of which each row has `count`."""
    rows, width = mask.flatten(0, -2), mask.shape[-1]
    flat = torch.nonzero_static(rows.flatten(), size=len(rows) * count)
    first = width * torch.arange(len(rows), device=mask.device)
    return flat.view(len(rows), count) - first[:, None]


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
