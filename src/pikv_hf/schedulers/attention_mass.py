"""The attention that the newest queries pay to keys."""

from collections.abc import Iterator

import torch
from pikv_kernels import is_fast_bfloat16
from torch import Tensor

from .base import Candidates

# Numbers in a block of attention weights: 4 MiB in float32, which fit into a CPU's cache. A block
# has several queries in any case, so that they are multiplied as a matrix.
BLOCK, MIN_QUERIES = 2**20, 16
# On accelerators blocks are larger, because each of them launches kernels.
BLOCK_ON_ACCELERATORS = 2**24


def attention_mass(tokens: Candidates) -> Tensor:
    """Return the attention [R, H, G, T] float32 that each candidate gets from each query head.

    It is the mean over the observed queries of softmax(scale * q k^T), causal, over the candidates
    and the tail tokens. Without observed queries it is zeros [R, H, 1, T].
    """
    queries, opened = tokens.queries, tokens.open_keys.shape[2]
    count = tokens.keys.shape[2]
    if queries is None:
        return tokens.keys.new_zeros(*tokens.keys.shape[:2], 1, count, dtype=torch.float32)
    newest = torch.arange(tokens.seen - opened, tokens.seen, device=queries.device)[None, None]
    if tokens.valid is not None or queries.shape[3] > opened:
        candidates = tokens.positions
        if tokens.valid is not None:
            candidates = candidates.masked_fill(~tokens.valid, tokens.seen)
        newest = torch.cat([candidates, newest.expand(*candidates.shape[:2], -1)], dim=2)
    keys = torch.cat([tokens.keys, tokens.open_keys], dim=2)
    mass = torch.zeros(*queries.shape[:3], count, dtype=torch.float32, device=queries.device)
    for weights, _ in attention_weights(queries, keys, newest, tokens.seen, tokens.scale):
        mass += weights[..., :count].sum(3)
    return mass.div_(queries.shape[3])


def attention_weights(
    queries: Tensor, keys: Tensor, newest: Tensor, seen: int, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the attention of `queries` [R, H, G, m, D] to `keys` [R, H, T, D], block by block.

    A block is the weights [R, H, G, n, T] float32 of n queries, and their positions [n]. The next
    block overwrites the weights. The queries are those of the newest m of `seen` tokens, and attend
    to no newer token: `newest` [R or 1, H or 1, t] are the positions of the last t keys; all other
    keys are older than every query. Queries that are zero (padding) or see no token get weights 0.
    """
    dtype = queries.dtype if is_fast_bfloat16(queries) else torch.float32
    # A dense copy costs less than products with keys that are not dense.
    keys = keys.detach().to(dtype).contiguous().mT
    max_numbers = BLOCK if keys.device.type == "cpu" else BLOCK_ON_ACCELERATORS
    rows = max(MIN_QUERIES, max_numbers // max(keys[:, :, 0].numel(), 1))
    size = -(-rows // queries.shape[2])
    at = torch.arange(seen - queries.shape[3], seen, device=queries.device)
    lowest = torch.full(
        (), torch.finfo(torch.float32).min, dtype=torch.float32, device=queries.device
    )
    products = scores = keys.new_empty(0)
    for first in range(0, queries.shape[3], size):
        block, query_positions = queries[:, :, :, first : first + size], at[first : first + size]
        # The query heads of a KV head are side by side, so that its keys are not copied for each.
        packed = block.flatten(2, 3).to(dtype)
        if products.shape[:-1] != packed.shape[:-1]:  # large, so made once
            products = keys.new_empty(*packed.shape[:-1], keys.shape[-1])
            scores = products.float()
        scores.copy_(torch.matmul(packed, keys, out=products)).mul_(scale)
        weights = scores.unflatten(2, block.shape[2:4])
        hidden = newest[:, :, None, None] > query_positions[:, None]
        weights[..., -hidden.shape[-1] :] += torch.where(hidden, lowest, torch.zeros_like(lowest))
        torch.softmax(scores, -1, out=scores)
        attends = block.ne(0).any(-1, keepdim=True)
        if hidden.shape[-1] == keys.shape[-1]:
            attends = attends & ~hidden.all(-1, keepdim=True)
        yield weights.mul_(attends), query_positions
