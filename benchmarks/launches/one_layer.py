"""One paged layer of the widths of Qwen3-30B-A3B, filled and asked for attention directly."""

from typing import Any

import census  # first: it puts the other folders on the path
import torch
from append_cpu import one_layer_model
from common import random_states, write
from torch import Tensor

from pikv_hf import PiKVCache
from pikv_hf.attention.function import pikv_attention
from pikv_hf.layer.paged_layer import PagedLayer

HEADS, GROUPS, DIM = 4, 8, 128
SHAPE = (HEADS, DIM, DIM)
DTYPE = torch.bfloat16


class OneLayer:
    """A cache of one layer that holds `tokens` random tokens on `device`."""

    def __init__(self, tokens: int, device: torch.device, **methods: Any) -> None:
        self.device = device
        self.model = one_layer_model(SHAPE)
        self.cache = PiKVCache(self.model, **methods)
        self.keys, self.values = random_states(0, tokens, SHAPE, DTYPE)
        write(self.layer, *self._on_device(self.keys, self.values))

    @property
    def layer(self) -> PagedLayer:
        return self.cache.layers[0]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append `keys` [1, H, q, D] and `values` and attend from `query` [1, H * G, q, D].

        Returns [1, q, H * G, D].
        """
        query, keys, values = self._on_device(query, keys, values)
        self.layer.update(keys, values)
        module = self.model.model.layers[0].self_attn
        out, _ = pikv_attention(module, query, keys, values, None, scaling=DIM**-0.5)
        return out

    def _on_device(self, *states: Tensor) -> list[Tensor]:
        return [census.on_device(t) if self.device == census.DEVICE else t for t in states]

    def attention_bytes(self) -> float:
        """Return the bytes of all tokens, as they are held: what attention has to read at least."""
        state = self.layer.state
        size = state.tail.keys.element_size()
        per_token = state.compressor.bytes_per_token(DIM, DIM, size, state.settings.page_size)
        return (
            HEADS * sum(state.num_departed) * per_token + state.tail.length * state.tail.token_bytes
        )


def new_tokens(count: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of `count` new tokens.

    The scores of random keys have the standard deviation `spread`.
    """
    keys, values = random_states(1, count, SHAPE, DTYPE)
    query, _ = random_states(2, count, (HEADS * GROUPS, DIM, 0), DTYPE)
    return query * spread, keys, values
