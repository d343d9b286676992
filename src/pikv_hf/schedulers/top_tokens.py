"""The best of many tokens, found without a sort."""

import torch
from torch import Tensor


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
