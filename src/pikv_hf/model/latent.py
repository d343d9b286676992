"""Multi-head latent attention (MLA): the cache holds one latent per token, not keys and values.

Shapes: B rows, Hq query heads, q new tokens, r the latent's rank, dn, dr, dv the dims of a head's
non-rotary key, rotary key and value.
"""

from typing import Any

import torch
from torch import Tensor

from .output_projection import matrix


class LatentQuery:
    """The up-projection of `module.kv_b_proj`, moved from every cached token to the query.

    With W = [Wk; Wv] of a head, q . (Wk c) = (Wk^T q) . c and sum p Wv c = Wv (sum p c)
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): attention runs on [latent | rotary key], one KV
    head that all query heads share.
    """

    def __init__(self, module: Any, query: Tensor, rank: int) -> None:
        self.rank = rank
        self.weight = matrix(module.kv_b_proj, rank, query).reshape(query.shape[1], -1, rank)
        self.nope_dim = module.qk_nope_head_dim

    def absorb(self, query: Tensor) -> Tensor:
        """Project `query` [B, Hq, q, dn + dr] to queries [B, Hq, q, r + dr] of cached latents."""
        nope, rotary = query[..., : self.nope_dim], query[..., self.nope_dim :]
        return torch.cat([_per_head(nope, self.weight[:, : self.nope_dim]), rotary], dim=-1)

    def expand(self, out: Tensor) -> Tensor:
        """Project attention output [B, Hq, q, r + dr] over latents to [B, Hq, q, dv]."""
        up = self.weight[:, self.nope_dim :].transpose(1, 2)
        return _per_head(out[..., : self.rank], up)


def _per_head(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply [B, Hq, q, a] by [Hq, a, b], reading the weight once for all rows."""
    batch, heads, length, _ = states.shape
    product = torch.bmm(states.transpose(0, 1).reshape(heads, batch * length, -1), weight)
    return product.view(heads, batch, length, -1).transpose(0, 1)
