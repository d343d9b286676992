"""Attention over one set of keys, returned with its log-sum-exp so that sets can be merged exactly.

Shapes: B rows, H KV heads, R query rows per KV head, T keys, D key dim, Dv value dim.
"""

import torch
from torch import Tensor

# Torch's fused kernel that also returns the log-sum-exp; None in a torch without it.
_flash_cpu = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query key^T + mask) value, and the log-sum-exp of the scores.

    All queries of one KV head are rows of R, so that a key is read once for all of them.

    Args:
        query: `[B, H, R, D]`.
        key: `[B, H, T, D]`, T > 0; last dimension dense, other dimensions of any stride.
        value: `[B, H, T, Dv]`, dtype of the key.
        mask: additive, dtype of the query, broadcastable to `[B, H, R, T]`; masked = the dtype's
            minimum and not -inf, so that a fully masked row has a weight of zero and no NaN.
        scale: factor of the scores.

    Returns:
        `[B, H, R, Dv]` in the dtype of the query and the log-sum-exp `[B, H, R]` (natural
        logarithm) in float32 (float64 for float64).
    """
    assert key.shape[2] > 0, "torch's CPU kernel ends the process without a key"
    fits = key.shape[-1] == value.shape[-1] and _is_flash_dtype(query)
    if _flash_cpu is not None and fits and query.device.type == "cpu":
        out, lse = _flash_cpu(query, key, value, attn_mask=mask, scale=scale)
        return out, lse
    return partial_attention_reference(query, key, value, mask, scale)


def partial_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Do the work of `partial_attention` in plain torch, with products in the dtype of the inputs.

    Products of queries and keys in float16 could overflow and are computed in float32.
    """
    wide = _accumulate_dtype(query)
    dtype = wide if query.dtype == torch.float16 else query.dtype
    scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)).to(wide) * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).to(value.dtype)
    return torch.matmul(weights, value), lse


def merge_partial(
    out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two partial results over disjoint keys: exact up to rounding in float32.

    Args:
        out, more_out: `[B, H, R, Dv]`.
        lse, more_lse: `[B, H, R]`, float32 or float64; `more_lse` may be -inf for a row without
            keys, `lse` may not.

    Returns:
        `[B, H, R, Dv]` in float32 (float64 for float64), so that many results merge without loss,
        and `[B, H, R]`.
    """
    weight = torch.sigmoid(more_lse - lse)[..., None]
    merged = torch.lerp(out.to(lse.dtype), more_out.to(lse.dtype), weight)
    return merged, torch.logaddexp(lse, more_lse)


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Return `out` with one more key in the softmax, of logit `sink` and value 0 (gpt-oss)."""
    return (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype)


def _is_flash_dtype(query: Tensor) -> bool:
    return query.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _accumulate_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)
