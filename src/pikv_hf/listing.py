"""Keys and values of a paged layer as one tensor each, as transformers' caches hold them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .autocast import without_autocast

if TYPE_CHECKING:
    from .layer import PagedLayer


@without_autocast
def listed_states(layer: "PagedLayer") -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D] of all tokens seen, zero at padding: a copy."""
    sealed = layer.seen - layer.tail.length
    full = []
    for name, tail in zip(("keys", "values"), layer.tail.view(), strict=True):
        states = tail.new_zeros(*tail.shape[:2], layer.seen, tail.shape[3])
        states[:, :, sealed:] = tail
        for row in range(layer.tail.batch):
            for span in layer.pages.spans([row]):
                columns = span["positions"][0].long().to(states.device)
                heads = torch.arange(states.shape[1], device=states.device)[:, None]
                states[row, heads, columns] = span[name][0]
        full.append(states)
    if layer.latent_rank is not None:
        rank = layer.latent_rank
        return full[0][..., :rank], full[0][..., rank:]
    return full[0], full[1]
