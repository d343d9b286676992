"""Selection of the tokens with the highest scores, without a sort."""

import torch
from torch import Tensor

# Last bits of the mantissa of a score that do not count.
DROPPED = 7


def best_places(scores: Tensor, count: int) -> Tensor:
    """Return ascending indices [..., count] of the highest `scores` [..., T], later if equal."""
    count = min(count, scores.shape[-1])
    return _ascending(mask_of_best(scores, count), count).unflatten(0, scores.shape[:-1])


def best_of_each_head(scores: Tensor, counts: Tensor) -> Tensor:
    """Return indices of the `counts` [...] highest `scores`: [..., max count], padded with -1."""
    width = int(counts.max())
    mask = mask_of_best(scores, counts, width)
    absent = torch.arange(width, device=counts.device) >= counts[..., None]
    # Rows with smaller counts also choose columns after the last token, which then become -1.
    chosen = torch.cat([mask, torch.arange(width, device=counts.device) < absent.sum(-1, True)], -1)
    return _ascending(chosen, width).unflatten(0, counts.shape).masked_fill(absent, -1)


def mask_of_best(scores: Tensor, counts: int | Tensor, width: int | None = None) -> Tensor:
    """Mark the `counts` (int or [...]) highest `scores` [..., T] of each row: a mask [..., T].

    `width` is the maximum of a tensor of counts, if the caller knows it: it is read otherwise.
    Scores are compared after `rounded`, as rounding errors depend on the batch. Of equal scores the
    later ones are chosen. NaN counts as infinity.
    """
    scores = rounded(scores.nan_to_num(torch.inf, torch.inf, -torch.inf))
    if isinstance(counts, Tensor):
        width, counts = int(counts.max()) if width is None else width, counts[..., None]
        best = scores.topk(max(width, 1), dim=-1).values
        lowest = best.gather(-1, (counts - 1).clamp_min(0))
    elif counts == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    else:
        lowest = scores.kthvalue(scores.shape[-1] - counts + 1, dim=-1, keepdim=True).values
    above, equal = scores > lowest, scores == lowest
    missing = counts - above.sum(-1, keepdim=True)
    newer = equal.flip(-1).cumsum(-1).flip(-1)
    return above | (equal & (newer <= missing))


def rounded(scores: Tensor) -> Tensor:
    """Round scores to 16 bits of the mantissa, in float32; scores in float64 stay as they are."""
    if scores.dtype == torch.float64:
        return scores
    bits = scores.float().contiguous().view(torch.int32)
    return ((bits + (1 << DROPPED >> 1)) & -(1 << DROPPED)).view(torch.float32)


def _ascending(mask: Tensor, count: int) -> Tensor:
    """Return the columns [n, count] where `mask` [..., T] is True; n rows, `count` True in each."""
    rows, width = mask.flatten(0, -2), mask.shape[-1]
    flat = torch.nonzero_static(rows.flatten(), size=len(rows) * count)
    first = width * torch.arange(len(rows), device=mask.device)
    return flat.view(len(rows), count) - first[:, None]
