"""Encoded pages of rows whose KV heads have equally many tokens, on their way into a store.

Shapes: R rows, H KV heads, S pages, T tokens of the longest row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cutting import paged
from .gather import taken
from .memory import on_device
from .token_table import TokenTable


@dataclass(frozen=True)
class UniformSpan:
    """Pages of `size` tokens: `fields` [R, H, S, ...], and `known`, other data of their T tokens.

    Each KV head of row r has `lengths[r]` tokens in them.
    """

    fields: dict[str, Tensor]
    known: TokenTable
    lengths: list[int]
    size: int

    def select(self, is_chosen: Tensor) -> "UniformSpan | None":
        """Copy the pages marked in `is_chosen` [R or 1, S] bool, on the CPU; None = there are none."""
        starts = self.size * torch.arange(is_chosen.shape[1])
        filled = (torch.tensor(self.lengths)[:, None] - starts).clamp(0, self.size)
        is_page = filled > 0 if len(is_chosen) > 1 else filled.sum(0, keepdim=True) > 0
        chosen = is_chosen & is_page  # rows end at different pages: no room for what is not there
        columns = [tuple(row.nonzero().flatten().tolist()) for row in chosen]
        width, counts = max(map(len, columns)), (filled * chosen).sum(1).tolist()
        if not width:
            return None
        padded = tuple(n for row in columns for n in (*row, *[0] * (width - len(row))))

        def selected(tensor: Tensor) -> Tensor:
            keep = on_device(padded, tensor.device).view(len(columns), 1, width)
            rows = max(len(columns), tensor.shape[0])
            return taken(tensor, keep.expand(rows, tensor.shape[1], -1))

        fields = {name: selected(tensor) for name, tensor in self.fields.items()}
        pages = {name: selected(paged(t, self.size)) for name, t in self.known.tensors.items()}
        known = TokenTable({name: tensor.flatten(2, 3) for name, tensor in pages.items()})
        return UniformSpan(fields, known.narrow(0, max(counts)), counts, self.size)
