"""Partial attention over codes: scales are applied to query, scores and weights, not to K or V.

Shapes: B rows, H KV heads, R query rows per KV head, S pages of P tokens, T tokens, D key dim, Dv
value dim, g groups of the head dim.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import unpack_codes
from .float8 import read_float8
from .partial_attention import MAX_SCORES, partial_attention_reference


class Quantized(NamedTuple):
    """Numbers `(code + offset) * scale + zero`, in pages.

    codes: `[..., P, D * bits / 8]`, int8 (packed by `pack_codes`) or a float8 dtype.
    scale, zero: `[..., P or 1, g]`, for each token (or page) and group of dims; `[..., 1, D]`, for
        each channel of a page. `zero` = None means 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    bits: int = 8
    offset: float = 0.0

    @property
    def dim(self) -> int:
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def is_per_channel(self) -> bool:
        return self.scale.shape[-2] == 1 and self.scale.shape[-1] == self.dim > 1

    def read(self, dtype: torch.dtype) -> Tensor:
        """Convert the codes to `dtype`, `[..., P, D]`."""
        if self.codes.dtype.is_floating_point:
            return read_float8(self.codes, dtype)
        return unpack_codes(self.codes, self.bits).to(dtype)


def dequantize(numbers: Quantized, dtype: torch.dtype) -> Tensor:
    """Return the numbers `[..., P, D]`, computed in `dtype`."""
    codes, groups = numbers.read(dtype), max(numbers.scale.shape[-1], 1)
    if numbers.offset:
        codes = codes + numbers.offset
    grouped = codes.unflatten(-1, (groups, -1))
    grouped = grouped * numbers.scale.to(dtype)[..., None]
    if numbers.zero is not None:
        grouped = grouped + numbers.zero.to(dtype)[..., None]
    return grouped.flatten(-2)


def quantized_attention(
    query: Tensor, keys: Quantized, values: Quantized | None, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale * query key^T) value over `tokens` tokens, and its log-sum-exp.

    Args:
        query: `[B, H, R, D]`; products have its dtype, bfloat16, float32 or float64.
        keys: pages `[B, H, S, P, ...]`.
        values: pages with scales per token or page; None = the keys are their own values and have
            no scales per channel.
        tokens: number of valid tokens, the first of the pages, > 0.
        scale: factor of the scores.

    Returns:
        `[B, H, R, Dv]` and `[B, H, R]`, in float32 (float64 for float64).
    """
    codes, numbers = _read(query, keys, values)
    step = max(1, MAX_SCORES // max(1, query.shape[0] * query.shape[1] * tokens))
    if query.shape[2] <= step:
        return _attend(query, codes, numbers, tokens, scale)[:2]
    parts = [_attend(part, codes, numbers, tokens, scale)[:2] for part in query.split(step, dim=2)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def quantized_weights(
    query: Tensor,
    keys: Quantized,
    values: Quantized | None,
    tokens: int,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with a few query rows; return also the weights `[B, H, R, tokens]`, of sum 1.

    Arguments as in `quantized_attention`; `mask` is added to the scores as in `partial_attention`.
    """
    out, lse, weights, total = _attend(query, *_read(query, keys, values), tokens, scale, mask)
    return out, lse, weights / total


def quantized_attention_reference(
    query: Tensor, keys: Quantized, values: Quantized | None, tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Do the work of `quantized_attention` over the numbers themselves."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = (
        dequantize(numbers, dtype).flatten(2, 3)[:, :, :tokens]
        for numbers in (keys, keys if values is None else values)
    )
    return partial_attention_reference(query.to(dtype), key, value, None, scale)


def _read(
    query: Tensor, keys: Quantized, values: Quantized | None
) -> tuple[tuple[Tensor, Tensor], tuple[Quantized, Quantized]]:
    """Return the codes of keys and values in the dtype of `query`, and their `Quantized`."""
    key_codes = keys.read(query.dtype)
    if values is None:
        return (key_codes, key_codes), (keys, keys)
    return (key_codes, values.read(query.dtype)), (keys, values)


def _attend(
    query: Tensor,
    codes: tuple[Tensor, Tensor],
    numbers: tuple[Quantized, Quantized],
    tokens: int,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `quantized_attention` of read codes; return also raw weights and their sums."""
    score = _scores_per_channel if numbers[0].is_per_channel else _scores
    scores = score(query, codes[0], numbers[0], scale)[..., :tokens]
    if mask is not None:
        scores = scores + mask
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_() if not scores.requires_grad else (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = _weighted(weights, codes[1], numbers[1], tokens) / total
    return out, (top + total.log()).squeeze(-1), weights, total


def _accumulated(product: Tensor) -> Tensor:
    return product.to(torch.promote_types(product.dtype, torch.float32))


def _per_token(tensor: Tensor, page_size: int) -> Tensor:
    """Return scales or zeros [B, H, S, P or 1, g] as [g, B, H, 1, T]."""
    full = tensor.expand(*tensor.shape[:3], page_size, tensor.shape[4])
    return full.flatten(2, 3).permute(3, 0, 1, 2)[..., None, :]


def _scores(query: Tensor, codes: Tensor, keys: Quantized, scale: float) -> Tensor:
    """Return scores [B, H, R, T]: one product per group, scaled for each token."""
    page_size, groups = codes.shape[3], keys.scale.shape[-1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    factors = _per_token(keys.scale.to(dtype) * scale, page_size)
    zeros = None
    if keys.zero is not None:
        zeros = _per_token(keys.zero.to(dtype) * scale, page_size)

    def of_group(group: int, part: Tensor, code: Tensor) -> Tensor:
        scores = _accumulated(part @ code.mT)
        if keys.offset or zeros is not None:
            whole = _accumulated(part).sum(-1, keepdim=True)
        if keys.offset:
            scores = scores.add_(whole, alpha=keys.offset)
        scores = scores * factors[group]
        return scores if zeros is None else scores.addcmul(whole, zeros[group])

    parts = zip(query.chunk(groups, -1), codes.flatten(2, 3).chunk(groups, -1), strict=True)
    return functools.reduce(torch.add, (of_group(g, *part) for g, part in enumerate(parts)))


def _scores_per_channel(query: Tensor, codes: Tensor, keys: Quantized, scale: float) -> Tensor:
    """Return scores [B, H, R, T]: the scales of a page's channels are applied to the query."""
    wide = _accumulated(query)[:, :, None] * scale
    scaled = wide * keys.scale
    scores = _accumulated(scaled.to(query.dtype) @ codes.mT)
    if keys.offset:
        scores = scores + keys.offset * scaled.sum(-1, keepdim=True)
    if keys.zero is not None:
        scores = scores + wide @ keys.zero.to(wide.dtype).mT
    return scores.transpose(2, 3).flatten(3)


def _weighted(weights: Tensor, codes: Tensor, values: Quantized, tokens: int) -> Tensor:
    """Multiply `weights` [B, H, R, T] with the values: [B, H, R, Dv]."""
    page_size, groups = codes.shape[3], values.scale.shape[-1]
    factors = _per_token(values.scale.to(weights.dtype), page_size)[..., :tokens]
    zeros = None
    if values.zero is not None:
        zeros = _per_token(values.zero.to(weights.dtype), page_size)[..., :tokens]
    parts = []
    for group, code in enumerate(codes.flatten(2, 3)[:, :, :tokens].chunk(groups, -1)):
        scaled = weights * factors[group]
        part = _accumulated(scaled.to(codes.dtype) @ code)
        if values.offset:
            part = part.add_(scaled.sum(-1, keepdim=True), alpha=values.offset)
        if zeros is not None:
            part = part + weights @ zeros[group].mT
        parts.append(part)
    return parts[0] if groups == 1 else torch.cat(parts, dim=-1)
