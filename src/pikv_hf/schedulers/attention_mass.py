"""What the newest queries attend to."""

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Tokens

# Numbers of one block of scores, 4 MiB in float32: it stays in a CPU's cache while it is worked on.
BLOCK = 2**20
# Blocks that are kept from the first look to the second; where there are more, they are made again.
MOST_KEPT = 16

# exp(scores - top) [R, H, G, m, t], and top [R, H, G, m, 1].
Exponentials = tuple[Tensor, Tensor]


def attention_mass(tokens: Tokens) -> Tensor:
    """The attention that each candidate gets from each query head, [R, H, G, T] in float32.

    The mean over the observed queries of softmax(scale * q k^T) over the candidates and the open
    tokens, causal. Scores are made in blocks of tokens, twice if there are many, so that no matrix
    of queries times tokens is held. Without an observed query all are equal.
    """
    queries = tokens.queries
    if queries is None:
        groups = tokens.keys.new_zeros(*tokens.keys.shape[:2], 1, tokens.keys.shape[2])
        return groups.float()
    step = max(1, BLOCK // queries[..., 0].numel())
    positions = _positions(tokens, queries.shape[3])
    exponentials = _exponentials(queries, tokens.scale, tokens.seen)

    def block(start: int) -> Exponentials:
        here = slice(start, start + step)
        return exponentials(
            tokens.keys[:, :, here], None if positions is None else positions[:, :, None, here]
        )

    starts = range(0, tokens.keys.shape[2], step)
    kept = [block(start) for start in starts] if len(starts) <= MOST_KEPT else None
    sums = [_log_sum(*each) for each in kept or map(block, starts)]
    opened = tokens.open_keys.shape[2]
    if opened:
        at = torch.arange(tokens.seen - opened, tokens.seen, device=queries.device)
        sums.append(_log_sum(*exponentials(tokens.open_keys, at)))
    total = torch.stack(sums).logsumexp(0)
    # A query whose keys have all been dropped attends to none of those that came later.
    total = total.masked_fill(total == -torch.inf, torch.inf)
    return torch.cat([_mean(*each, total) for each in kept or map(block, starts)], dim=-1)


def _positions(tokens: Tokens, asked: int) -> Tensor | None:
    """Of the candidates, those without a token being newer than every query; None if all are older."""
    if tokens.valid is not None:
        return tokens.positions.masked_fill(~tokens.valid, tokens.seen)
    return None if asked <= tokens.open_keys.shape[2] else tokens.positions


def _exponentials(
    queries: Tensor, scale: float, seen: int
) -> Callable[[Tensor, Tensor | None], Exponentials]:
    """A function of keys [R, H, t, D] and their positions, where some may be newer than a query."""
    # The query heads of a KV head stand side by side, so that its keys are read where they are.
    packed = queries.flatten(2, 3)
    dtype = product_dtype(packed)
    packed = packed.to(dtype)
    asked_at = torch.arange(seen - queries.shape[3], seen, device=queries.device)[:, None]
    least = torch.finfo(torch.float32).min

    def exponentials(keys: Tensor, positions: Tensor | None) -> Exponentials:
        scores = (packed @ keys.to(dtype).mT).float().mul_(scale).unflatten(2, queries.shape[2:4])
        if positions is not None:
            scores.masked_fill_(positions.unsqueeze(-2) > asked_at, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp_min_(least)
        return scores.sub_(top).exp_(), top

    return exponentials


def product_dtype(queries: Tensor) -> torch.dtype:
    """The dtype in which `queries` meet keys: bfloat16 if it is theirs and fast here, else float32."""
    if queries.dtype != torch.bfloat16:
        return torch.float32
    is_fast = queries.device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return queries.dtype if is_fast else torch.float32


def _log_sum(exponentials: Tensor, top: Tensor) -> Tensor:
    return exponentials.sum(-1).log_() + top[..., 0]


def _mean(exponentials: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """The mean over queries of exponentials / total, [R, H, G, t]; `total` [R, H, G, m] a logarithm."""
    factors = (top[..., 0] - total).exp_() / total.shape[-1]
    return (factors.unsqueeze(-2) @ exponentials).squeeze(-2)
