"""Partial attention that also returns its weights.

Shapes: B rows, H KV heads, R query rows per KV head, T keys, D key dim, Dv value dim.
"""

import torch
from torch import Tensor

from .partial_attention import partial_attention_reference

# Keys of at most this many numbers are widened to float32, which is faster than two products.
FEW = 2**19


def weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with a few query rows; return also the weights `[B, H, R, T]`, float32 (float64).

    This is as exact as a fused kernel, which keeps scores in float32: a bfloat16 product is
    rounded, so a second product adds the remainder. Float16 could overflow and is widened.

    Args:
        query, key, value, mask, scale: as in `partial_attention`.

    Returns:
        `[B, H, R, Dv]` in the dtype of the query, the log-sum-exp `[B, H, R]` and the weights,
        whose sum over T is 1.
    """
    lead = query.shape[:2]
    query, key, value = (t.flatten(0, 1) for t in (query, key, value))
    scores = _scores(query, key).unflatten(0, lead).mul_(scale)
    if mask is not None:
        scores += mask
    weights = scores.softmax(-1)
    # The largest weight is exp(largest score - lse).
    lse = scores.amax(-1) - weights.amax(-1).log()
    out = torch.bmm(weights.flatten(0, 1).to(value.dtype), value)
    return out.unflatten(0, lead), lse, weights


def weighted_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the work of `weighted_attention` in plain torch, in float32 or float64."""
    out, lse = partial_attention_reference(query, key, value, mask, scale)
    scores = query.to(lse.dtype) @ key.to(lse.dtype).mT * scale
    if mask is not None:
        scores = scores + mask
    return out, lse, torch.exp(scores - lse[..., None])


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Return query key^T `[N, R, T]` in float32 or float64."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if query.dtype == wide or key.numel() <= FEW or not is_fast_bfloat16(query):
        return torch.bmm(query.to(wide), key.to(wide).mT)
    # Keys come first, so that their batches need not be dense.
    rounded = torch.bmm(key, query.mT)
    rest = torch.baddbmm(rounded, key, query.mT, beta=-1)
    return rounded.mT.to(wide).add_(rest.mT).contiguous()


def is_fast_bfloat16(query: Tensor) -> bool:
    """Return whether `query` is bfloat16 and its device multiplies bfloat16 fast."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return query.dtype == torch.bfloat16
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and supported()
