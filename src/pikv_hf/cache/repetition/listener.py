"""The attention that tokens get while they are repeated.

Shapes: B rows, H KV heads, G query heads of each, q new tokens, n tail tokens, S keys.
"""

import torch
from torch import Tensor

from ...layer.observations import EVERY, Observations
from ...layer.state import LayerState
from ...schedulers.attention_mass import attention_weights
from .text import Part

# Smallest mark of a repeated token; tokens that are not repeated have mark 0.
MIN_MARK = torch.finfo(torch.float32).tiny


class Listener(Observations):
    """Replaces a layer's observations while the model repeats a part of each row of its tail.

    The first new tokens of a row, as many as its part has ids, are the repetition. `marks`
    [B, H, n]: the largest attention that each tail token got.
    """

    def __init__(self, state: LayerState) -> None:
        super().__init__(EVERY)
        self.state = state
        self.marks = state.tail.keys.new_zeros(
            *state.tail.keys.shape[:2], state.tail.length, dtype=torch.float32
        )
        self.parts: list[Part] = []

    def hear(self, parts: list[Part]) -> None:
        """Set which part of each row the next forward pass repeats."""
        self.parts = parts

    def append(self, queries: Tensor, visible: Tensor | None) -> None:
        """Mark the repeated columns by `queries` [B, H, G, q, D] of new tokens; keep no query."""
        tail_keys = self.state.tail.view()[0]
        before = tail_keys.shape[2] - queries.shape[3]
        for row, (columns, sinks, ids) in enumerate(self.parts):
            count = len(ids)
            if count:
                read = torch.cat([sinks, columns, torch.arange(before, before + count)])
                keys = tail_keys[row][:, read.to(tail_keys.device)]
                marks = largest(queries[row, :, :, :count], keys, self.state.scale)
                marks = marks[:, len(sinks) : len(sinks) + len(columns)].clamp_min(MIN_MARK)
                self.marks[row][:, columns.to(tail_keys.device)] = marks

    def truncate(self, removed: int, opened: int, visible: Tensor | None) -> None:
        """Do nothing: no queries of the removed tokens are kept."""


def largest(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the largest attention [H, S] of `queries` [H, G, q, D] to each of `keys` [H, S, D].

    The newest q keys belong to the queries' tokens, causally. Precision as in `attention_weights`.
    """
    count = queries.shape[2]
    newest = torch.arange(count, device=queries.device)[None, None]
    maxima = torch.zeros(keys.shape[:2], dtype=torch.float32, device=queries.device)
    for weights, _ in attention_weights(queries[None], keys[None], newest, count, scale):
        maxima = torch.maximum(maxima, weights[0].amax((1, 2)))
    return maxima
