"""Attention over one set of keys, returned with its log-sum-exp so that sets can be merged exactly.

Shapes: B rows, H KV heads, R query rows per KV head, T keys, D key dim, Dv value dim.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from .fused_attention import FUSED

# Scores computed at a time without a fused kernel. They stay in a CPU's cache; all scores of a long
# chunk would take more memory than the keys.
MAX_SCORES = 2**21
# Numbers of partial results that are held to be merged at once.
MAX_MERGED = 2**22


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query key^T + mask) value, and the log-sum-exp of the scores.

    All queries of one KV head are rows of R, so that a key is read once for all of them.

    Args:
        query: `[B, H, R, D]`.
        key: `[B, H, T, D]`, T > 0; last dimension dense, other dimensions of any stride.
        value: `[B, H, T, Dv]`, dtype of the key.
        mask: additive, dtype of the query, broadcastable to `[B, H, R, T]`; masked =
            `lowest_score` and not -inf, so that a fully masked row has a weight of zero and no NaN.
        scale: factor of the scores.

    Returns:
        `[B, H, R, Dv]` in the dtype of the query and the log-sum-exp `[B, H, R]` (natural
        logarithm) in float32 (float64 for float64).
    """
    assert key.shape[2] > 0, "torch's CPU kernel ends the process without a key"
    fused = FUSED.get(query.device.type)
    result = None if fused is None else fused(query, key, value, mask, scale)
    if result is not None:
        return result
    dtype, wide = query.dtype, _accumulate_dtype(query)
    query, key, value = (states.to(wide) for states in (query, key, value))
    step = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    in_rows = functools.partial(torch.cat, dim=2)
    rows = query.split(step, dim=2)
    is_shared = mask is None or mask.shape[2] == 1
    masks = [mask] * len(rows) if is_shared else mask.split(step, dim=2)
    parts = [
        partial_attention_reference(row, key, value, part, scale)
        for row, part in zip(rows, masks, strict=True)
    ]
    out, lse = parts[0] if len(parts) == 1 else map(in_rows, zip(*parts, strict=True))
    return out.to(dtype), lse


def partial_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Do the work of `partial_attention` in plain torch, in float32 or float64."""
    wide = _accumulate_dtype(query)
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return torch.matmul(weights, value.to(wide)).to(query.dtype), lse


def merge_partials(parts: Iterable[tuple[Tensor, Tensor]], sink: Tensor | None = None) -> Tensor:
    """Return the output over all keys of partial results, which are over disjoint keys.

    Args:
        parts: outputs `[B, H, R, Dv]` and log-sum-exps `[B, H, R]`, as of `partial_attention`. A
            row may be without keys (-inf), but not in the first result.
        sink: logit of one more key, of value 0, in the softmax (gpt-oss), broadcastable to
            `[B, H, R]`.

    Returns:
        `[B, H, R, Dv]`: of one result without a sink its output, otherwise float32 or float64.
    """
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for out, lse in parts:
        if outs and (len(outs) + 1) * out.numel() > MAX_MERGED:
            out, lse = merge_partial(outs.pop(), lses.pop(), out, lse)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0] if sink is None else outs[0] * torch.sigmoid(lses[0] - sink)[..., None]
    wide = lses[0].dtype
    if len(outs) == 2 and sink is None:
        share = torch.sigmoid(lses[1] - lses[0])[..., None]
        return torch.lerp(outs[0].to(wide), outs[1].to(wide), share)
    lses += [] if sink is None else [sink.to(wide).expand_as(lses[0])]
    shares = torch.stack(lses).softmax(0)[: len(outs), ..., None]
    return (torch.stack(outs) * shares).sum(0)


def merge_with_lse(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge partial results over disjoint keys into one partial result.

    Args:
        parts: one or more outputs `[B, H, R, Dv]` and log-sum-exps `[B, H, R]`, as of
            `partial_attention`. A row may be without keys (-inf) in any of them.

    Returns:
        `[B, H, R, Dv]` in float32 (float64 for float64), but of one result its output, and
        `[B, H, R]`: zeros and -inf for a row without keys.
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    shares = (lses - total.clamp_min(torch.finfo(total.dtype).min)).exp_()
    outs = torch.stack([out for out, _ in parts]).to(total.dtype)
    return (outs * shares[..., None]).sum(0), total


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


def _accumulate_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)
