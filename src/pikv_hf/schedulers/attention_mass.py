"""What the newest queries attend to."""

from collections.abc import Iterator

import torch
from pikv_kernels import is_fast_bfloat16
from torch import Tensor

from .base import Candidates

# Numbers of one block of attention weights, 4 MiB in float32, and the fewest queries of one: a block
# stays in a CPU's cache while it is worked on, and its product is not one of vectors.
BLOCK, FEWEST = 2**20, 16
# Elsewhere each block is kernels to launch.
BLOCK_ON_ACCELERATORS = 2**24


def attention_mass(tokens: Candidates) -> Tensor:
    """The attention that each candidate gets from each query head, [R, H, G, T] in float32.

    The mean over the observed queries of softmax(scale * q k^T) over the candidates and the open
    tokens, causal. Without an observed query all are equal.
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
    """How the newest `queries` [R, H, G, m, D] of `seen` attend to `keys` [R, H, T, D], some at a time:

    weights [R, H, G, n, T] in float32 of n queries, and their positions [n]. A query attends to tokens
    that are not newer than itself; `newest` [R or 1, H or 1, t] are the positions of the last t keys,
    the others being older than every query. Those of padding, which are zero, attend to nothing, like
    those that see no token. What is yielded is overwritten by the next.
    """
    dtype = queries.dtype if is_fast_bfloat16(queries) else torch.float32
    # A dense copy costs less than products with keys that are not.
    keys = keys.detach().to(dtype).contiguous().mT
    most = BLOCK if keys.device.type == "cpu" else BLOCK_ON_ACCELERATORS
    rows = max(FEWEST, most // max(keys[:, :, 0].numel(), 1))
    size = -(-rows // queries.shape[2])
    at = torch.arange(seen - queries.shape[3], seen, device=queries.device)
    least = torch.full(
        (), torch.finfo(torch.float32).min, dtype=torch.float32, device=queries.device
    )
    products = scores = keys.new_empty(0)
    for first in range(0, queries.shape[3], size):
        block, asked_at = queries[:, :, :, first : first + size], at[first : first + size]
        # The query heads of a KV head stand side by side: its keys are not copied for each.
        packed = block.flatten(2, 3).to(dtype)
        if products.shape[:-1] != packed.shape[:-1]:  # large ones, made once
            products = keys.new_empty(*packed.shape[:-1], keys.shape[-1])
            scores = products.float()
        scores.copy_(torch.matmul(packed, keys, out=products)).mul_(scale)
        weights = scores.unflatten(2, block.shape[2:4])
        hidden = newest[:, :, None, None] > asked_at[:, None]
        weights[..., -hidden.shape[-1] :] += torch.where(hidden, least, torch.zeros_like(least))
        torch.softmax(scores, -1, out=scores)
        attends = block.ne(0).any(-1, keepdim=True)
        if hidden.shape[-1] == keys.shape[-1]:
            attends = attends & ~hidden.all(-1, keepdim=True)
        yield weights.mul_(attends), asked_at
