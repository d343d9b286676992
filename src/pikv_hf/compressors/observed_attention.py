"""Attention of the observed queries to pages, and its errors if the pages are encoded.

Shapes: R rows, H KV heads, S pages of P tokens, Q queries, M encodings, Dk and Dv key and value
dims. Values of 0 dims mean latents, which are their own values. All softmaxes are over the tokens
of the given pages only; the zeros that pad a page are not tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from pikv_kernels import merge_partial
from torch import Tensor

from ..storage.codec import attend_states, encoded
from .base import PAGES_AT_A_TIME, Compressor, computed_dtype

STAND_INS = 32

# Outputs [R, H, Q, Dv] and log-sum-exp [R, H, Q].
Partial = tuple[Tensor, Tensor]


def queries_or_stand_ins(keys: Tensor, queries: Tensor | None) -> Tensor:
    """Return `queries` [R, H, Q, Dk], scaled as in `encode_observed`, in float32 or float64.

    Without queries the newest keys replace them, the best guess of later queries at hand.
    """
    if queries is None:
        newest = keys.flatten(2, 3)[:, :, -STAND_INS:]
        queries = newest * keys.shape[-1] ** -0.5
    return queries.to(computed_dtype(keys.dtype))


def page_masses(keys: Tensor, queries: Tensor) -> Tensor:
    """Return the share of attention to each page, [R, H, S], as the mean over `queries`.

    Zero queries are padding and do not count. `keys` is [R, H, S, P, Dk].
    """
    sums = queries.new_empty(*keys.shape[:3], queries.shape[2])
    for target, part in _portions(sums, keys):
        target.copy_(_scores(part, queries).logsumexp(-1))
    masses = sums.softmax(2)
    counts = (queries != 0).any(-1).to(masses.dtype)[:, :, None]
    return (masses * counts).sum(-1) / counts.sum(-1).clamp_min(1)


def output_errors(
    encodings: Sequence[Compressor], keys: Tensor, values: Tensor, queries: Tensor, shrink: float
) -> Tensor:
    """Estimate the squared error of attention outputs if a page is encoded, [M, R, H, S].

    With all pages of a KV head encoded, the error of the outputs of `queries` is measured, then
    divided among the pages in proportion to a prediction. To first order, replacing k_i, v_i by
    k_i + dk_i, v_i + dv_i changes the output o of a query q by the sum over i of
    a_i (dv_i + (q . dk_i) (v_i - o)), with a the attention weights. The prediction of a page is
    the sum of the squares of its terms over tokens and `queries`. It would be exact if the terms of
    tokens were independent; they are not, to a degree that differs between encodings.

    Later queries attend to other tokens than observed queries do. For the prediction, each squared
    weight a_i^2 is therefore moved by `shrink` towards the mean over all tokens of the KV head.
    """
    output, lse = _attention(keys, values, queries)
    mean = _mean_squares(keys, queries, lse)[:, :, None, :, None]
    counts = (queries != 0).any(-1)
    # Allocated here: small tensors kept between large ones that are freed leave holes in the heap.
    parts = queries.new_empty(len(encodings), *keys.shape[:3])
    seen: list[Partial | None] = [None for _ in encodings]
    start = 0
    for pages in _portions(keys, values):
        stop = start + pages[0].shape[2]
        weight = torch.lerp(_squares(pages[0], queries, lse), mean, shrink)
        weight = weight * counts[:, :, None, :, None] * _is_token(pages[0])[..., None, :]
        for number, encoding in enumerate(encodings):
            restored = encoding.decode(encoded(encoding, *pages, queries))
            changes = _changes(pages, restored, queries, output)
            parts[number, :, :, start:stop] = (weight * changes).sum((-1, -2))
            seen[number] = _with_pages(seen[number], restored, pages[0], queries)
        start = stop
    for number, result in enumerate(seen):
        assert result is not None, "there are pages"
        squares = (result[0] - output).square().sum(-1)
        parts[number] = _shared_out((squares * counts).sum(-1), parts[number])
    return parts


def _shared_out(whole: Tensor, parts: Tensor) -> Tensor:
    """Scale `parts` [R, H, S], none negative, so that their sum is `whole` [R, H]."""
    total = parts.sum(-1).clamp_min(torch.finfo(parts.dtype).tiny)
    return parts * (whole / total)[..., None]


def _squares(keys: Tensor, queries: Tensor, lse: Tensor) -> Tensor:
    """Return squared attention weights [R, H, S, Q, P]; `lse` [R, H, Q] is over all pages."""
    return (2 * (_scores(keys, queries) - lse[:, :, None, :, None])).exp()


def _mean_squares(keys: Tensor, queries: Tensor, lse: Tensor) -> Tensor:
    """Return the mean of the squared attention weights over all tokens, [R, H, Q]."""
    total, tokens = torch.zeros_like(lse), torch.zeros_like(lse)
    for part, _ in _portions(keys, keys):
        total += _squares(part, queries, lse).sum((2, 4))
        tokens += _is_token(part).sum((2, 3))[..., None]
    return total / tokens


def _changes(
    pages: tuple[Tensor, Tensor], restored: tuple[Tensor, Tensor], queries: Tensor, output: Tensor
) -> Tensor:
    """Return |dv_i + (q . dk_i) (v_i - o)|^2 of each token and query, [R, H, S, Q, P]."""
    dtype, page_queries = queries.dtype, queries[:, :, None]
    keys, new_keys = (t[0].to(dtype) for t in (pages, restored))
    values, new_values = (
        t[1].to(dtype) if t[1].shape[-1] else t[0].to(dtype) for t in (pages, restored)
    )
    logits = page_queries @ (new_keys - keys).mT
    change, output = new_values - values, output[:, :, None]
    across = (change * values).sum(-1)[..., None, :] - output @ change.mT
    apart = values.square().sum(-1)[..., None, :] - 2 * output @ values.mT
    apart = apart + output.square().sum(-1)[..., None]
    return change.square().sum(-1)[..., None, :] + logits * (2 * across + logits * apart)


def _attention(keys: Tensor, values: Tensor, queries: Tensor) -> Partial:
    """Return the outputs [R, H, Q, Dv] and log-sum-exp [R, H, Q] of attention over all pages."""
    result = None
    for part in _portions(keys, values):
        result = _with_pages(result, part, part[0], queries)
    assert result is not None, "there are pages"
    return result


def _with_pages(
    result: Partial | None, pages: tuple[Tensor, Tensor], originals: Tensor, queries: Tensor
) -> Partial:
    """Merge `result` with attention over `pages`; zeros in the keys `originals` are padding."""
    keys, values = (states.flatten(2, 3).to(queries.dtype) for states in pages)
    mask = _hidden(originals, queries.dtype).flatten(2, 3)[:, :, None]
    more = attend_states(queries, keys, values, mask, 1.0)
    return more if result is None else merge_partial(*result, *more)


def _portions(keys: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of a few pages at a time."""
    pages = max(PAGES_AT_A_TIME // (keys.shape[0] * keys.shape[1]), 1)
    return zip(keys.split(pages, dim=2), values.split(pages, dim=2), strict=True)


def _scores(keys: Tensor, queries: Tensor) -> Tensor:
    """Return scores [R, H, S, Q, P], very low where there is no token."""
    scores = queries[:, :, None] @ keys.to(queries.dtype).mT
    return scores + _hidden(keys, queries.dtype)[..., None, :]


def _hidden(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [R, H, S, P]: 0, or very low where there is no token."""
    return (~_is_token(keys)).to(dtype) * (torch.finfo(dtype).min / 4)


def _is_token(keys: Tensor) -> Tensor:
    """Mark the tokens, [R, H, S, P]; a key of nothing but zeros pads a page."""
    return (keys != 0).any(-1)
