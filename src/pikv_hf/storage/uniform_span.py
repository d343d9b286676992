"""Encoded pages of rows whose KV heads have equally many tokens, on their way into a store.

Shapes: R rows, H KV heads, S pages, T tokens of the longest row.
"""

from dataclasses import dataclass

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
        columns = [tuple(row.nonzero().flatten().tolist()) for row in is_chosen]
        width = max(map(len, columns))
        counts = self._counts(columns)
        if not any(counts):
            return None
        padded = tuple(n for row in columns for n in (*row, *[0] * (width - len(row))))

        def chosen(tensor: Tensor) -> Tensor:
            keep = on_device(padded, tensor.device).view(len(columns), 1, width)
            rows = max(len(columns), tensor.shape[0])
            return taken(tensor, keep.expand(rows, tensor.shape[1], -1))

        fields = {name: chosen(tensor) for name, tensor in self.fields.items()}
        pages = {name: chosen(paged(t, self.size)) for name, t in self.known.tensors.items()}
        known = TokenTable({name: tensor.flatten(2, 3) for name, tensor in pages.items()})
        return UniformSpan(fields, known.narrow(0, max(counts)), counts, self.size)

    def _counts(self, columns: list[tuple[int, ...]]) -> list[int]:
        """Count the tokens of each row in its pages `columns`; one entry is for all rows."""
        per_row = columns * (len(self.lengths) // len(columns))
        return [
            sum(min(max(length - self.size * page, 0), self.size) for page in chosen)
            for length, chosen in zip(self.lengths, per_row, strict=True)
        ]
