"""Merging of partial attention results whose number differs between rows."""

import torch
from torch import Tensor


def merge_segments(out: Tensor, lse: Tensor, owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """Merge partial results over disjoint keys, in any order, into one result per owner.

    Args:
        out: `[N, R, Dv]`.
        lse: `[N, R]`, float32 or float64, finite.
        owner: `[N]` int64, 0 <= owner < owners.
        owners: number of owners.

    Returns:
        `[owners, R, Dv]` in the dtype of `lse`, and `[owners, R]`: zeros and -inf for an owner
        without results.
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
    """Do the work of `merge_segments` owner by owner."""
    outs, lses = [], []
    for number in range(owners):
        own_out, own_lse = out[owner == number].to(lse.dtype), lse[owner == number]
        lses.append(torch.logsumexp(own_lse, dim=0))
        weight = torch.exp(own_lse - lses[-1])
        outs.append((own_out * weight[..., None]).sum(0))
    return torch.stack(outs), torch.stack(lses)
