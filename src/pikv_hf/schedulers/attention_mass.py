"""What the newest queries attend to."""

import torch
from torch import Tensor

from .base import Tokens

# Numbers of one block of scores: 64 MiB in float32.
BLOCK = 2**24


def attention_mass(tokens: Tokens) -> Tensor:
    """The attention that each candidate gets from each query head, [R, H, G, T] in float32.

    The mean over the observed queries of softmax(scale * q k^T) over the candidates and the open
    tokens, causal. Scores are made in blocks of tokens, twice if there are several, so that no matrix
    of queries times tokens is held. Without an observed query all are equal.
    """
    queries = tokens.queries
    if queries is None:
        groups = tokens.keys.new_zeros(*tokens.keys.shape[:2], 1, tokens.keys.shape[2])
        return groups.float()
    asked, opened = queries.shape[3], tokens.open_keys.shape[2]
    device = tokens.keys.device
    asked_at = torch.arange(tokens.seen - asked, tokens.seen, device=device)
    opened_at = torch.arange(tokens.seen - opened, tokens.seen, device=device)
    block = max(1, BLOCK // queries[..., 0].numel())

    positions = tokens.positions
    if tokens.valid is not None:  # a place without a token is newer than every query
        positions = positions.masked_fill(~tokens.valid, tokens.seen)

    # The query heads of a KV head stand side by side, so that its keys are read where they are.
    packed = queries.flatten(2, 3).float() * tokens.scale
    are_older = tokens.valid is None and asked <= opened

    def scores(keys: Tensor, positions: Tensor, are_older: bool = are_older) -> Tensor:
        """[R, H, G, m, t], -inf where a key is newer than the query."""
        product = packed @ keys.float().transpose(-1, -2)
        product = product.unflatten(2, queries.shape[2:4])
        if are_older:
            return product
        hidden = positions.unsqueeze(-2) > asked_at[:, None]
        return product.masked_fill_(hidden, -torch.inf)

    parts = [
        (tokens.keys[:, :, i : i + block], positions[:, :, None, i : i + block])
        for i in range(0, tokens.keys.shape[2], block)
    ]
    only = scores(*parts[0]) if len(parts) == 1 else None
    sums = [(scores(*part) if only is None else only).logsumexp(-1) for part in parts]
    if opened:
        sums.append(scores(tokens.open_keys, opened_at, False).logsumexp(-1))
    total = torch.stack(sums).logsumexp(0)[..., None]
    # A query whose keys have all been dropped attends to none of those that came later.
    total = total.masked_fill(total == -torch.inf, torch.inf)

    def mass(part: tuple[Tensor, Tensor]) -> Tensor:
        return (scores(*part) if only is None else only).sub_(total).exp_().mean(-2)

    return torch.cat([mass(part) for part in parts], dim=-1)
