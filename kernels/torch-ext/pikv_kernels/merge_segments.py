"""Merging partial attention results whose number differs from row to row."""

import torch
from torch import Tensor


def merge_segments(out: Tensor, lse: Tensor, owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """One result for each owner, from partial results over disjoint keys in any order.

    Args:
        out: `[N, R, Dv]`.
        lse: `[N, R]`, float32 or float64, finite.
        owner: `[N]` int64, 0 <= owner < owners.
        owners: number of owners.

    Returns:
        `[owners, R, Dv]` in the dtype of `lse`, and `[owners, R]`: zeros and -inf for an owner of
        no result.
    """
    shape = owners, *lse.shape[1:]
    index = owner[:, None].expand_as(lse)
    highest = lse.new_full(shape, -torch.inf).scatter_reduce_(0, index, lse, "amax")
    weight = torch.exp(lse - highest.index_select(0, owner))
    total = lse.new_zeros(shape).index_add_(0, owner, weight)
    weighted = out.to(lse.dtype).mul(weight[..., None])
    merged = lse.new_zeros(*shape, out.shape[-1]).index_add_(0, owner, weighted)
    merged = merged.div_(total.clamp_min(torch.finfo(lse.dtype).tiny)[..., None])
    return merged, highest + torch.log(total)


def merge_segments_reference(
    out: Tensor, lse: Tensor, owner: Tensor, owners: int
) -> tuple[Tensor, Tensor]:
    """`merge_segments` owner by owner."""
    merged, together = [], []
    for number in range(owners):
        mine, their_lse = out[owner == number].to(lse.dtype), lse[owner == number]
        together.append(torch.logsumexp(their_lse, dim=0))
        weight = torch.exp(their_lse - together[-1])
        merged.append((mine * weight[..., None]).sum(0))
    return torch.stack(merged), torch.stack(together)
