"""What the newest queries attend to."""

import torch
from torch import Tensor

from .base import Tokens

# Numbers of one block of scores: 64 MiB in float32.
BLOCK = 2**24


def attention_mass(tokens: Tokens) -> Tensor:
    """The attention that each candidate gets from each query head, [R, H, G, T] in float32.

    The mean over the observed queries of softmax(scale * q k^T) over the candidates and the open
    tokens, causal. Scores are made in blocks of tokens, twice, so that no matrix of queries times
    tokens is held. Without an observed query all are equal.
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

    def scores(keys: Tensor, positions: Tensor) -> Tensor:
        """[R, H, G, m, t], -inf where a key is newer than the query."""
        product = queries.float() @ keys.float()[:, :, None].transpose(-1, -2) * tokens.scale
        hidden = positions.unsqueeze(-2) > asked_at[:, None]
        return product.masked_fill(hidden, -torch.inf)

    parts = [
        (tokens.keys[:, :, i : i + block], positions[:, :, None, i : i + block])
        for i in range(0, tokens.keys.shape[2], block)
    ]
    sums = [scores(keys, positions).logsumexp(-1) for keys, positions in parts]
    if opened:
        sums.append(scores(tokens.open_keys, opened_at).logsumexp(-1))
    total = torch.stack(sums).logsumexp(0)[..., None]
    # A query whose keys have all been dropped attends to none of those that came later.
    total = total.masked_fill(total == -torch.inf, torch.inf)
    return torch.cat([(scores(*part) - total).exp().mean(-2) for part in parts], dim=-1)
