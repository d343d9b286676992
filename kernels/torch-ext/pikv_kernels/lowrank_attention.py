"""Partial attention over low-rank pages: bases are multiplied with queries, not with tokens.

Shapes: B rows, H KV heads, R query rows per KV head, S pages of P tokens, T tokens, r rank, D key
dim, Dv value dim.
"""

import torch
from torch import Tensor

from .partial_attention import partial_attention_reference

# Coefficients [B, H, S, P, r] and basis [B, H, S, r, D] of pages `coefficients @ basis`.
Factors = tuple[Tensor, Tensor]


def lowrank_attention(
    query: Tensor, keys: Factors, values: Factors, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query key^T) value over `tokens` tokens, and its log-sum-exp.

    If R is less than P this is less work than attention over the decoded pages: a basis is
    multiplied with the queries and with the weighted coefficients instead of with the tokens.

    Args:
        query: `[B, H, R, D]`.
        keys, values: factors of the same dtype.
        tokens: number of valid tokens, the first of the pages, > 0.
        scale: factor of the scores.

    Returns:
        `[B, H, R, Dv]` and `[B, H, R]`, in float32 (float64 for float64).
    """
    # In 16 bits the scores would be rounded, and the factors are small enough to be copied.
    dtype = torch.promote_types(query.dtype, torch.float32)
    coefficients, basis = (factor.to(dtype) for factor in keys)
    projected = (query.to(dtype) * scale)[:, :, None] @ basis.mT
    scores = (projected @ coefficients.mT).transpose(2, 3).flatten(3)
    scores[..., tokens:] = -torch.inf
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    coefficients, basis = (factor.to(dtype) for factor in values)
    weights = weights.unflatten(3, coefficients.shape[2:4]).transpose(2, 3)
    return (weights @ coefficients @ basis).sum(dim=2), lse


def lowrank_attention_reference(
    query: Tensor, keys: Factors, values: Factors, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Do the work of `lowrank_attention` over the pages themselves."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = (
        (coefficients.to(dtype) @ basis.to(dtype)).flatten(2, 3)[:, :, :tokens]
        for coefficients, basis in (keys, values)
    )
    return partial_attention_reference(query.to(dtype), key, value, None, scale)
