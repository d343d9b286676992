"""What a router selects from.

Shapes: B batch rows, H KV heads, M pages of all stores, m pages of one store.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..routers import Pages
from ..storage.ragged_pages import RaggedPages
from ..storage.uniform_pages import UniformPages


@dataclass(frozen=True)
class Candidates:
    """The m pages of one store for all batch rows, with their valid `tokens` [B, H or 1, m].

    A row that does not read the store has any pages. `has_partial`: some pages are not full. `start`
    is the index of the first page among the pages of all stores. Batch row b reads stored row
    `rows[b]`; None = the stored rows are the batch rows.
    """

    store: UniformPages | RaggedPages
    rows: Tensor | None
    pages: Pages
    tokens: Tensor
    has_partial: bool
    start: int

    @property
    def count(self) -> int:
        return self.tokens.shape[2]

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.pages.digests.values(), self.pages.numbers, self.tokens)


@dataclass(frozen=True)
class Plan:
    """What a router selects from, until pages change.

    `is_free` [B, H, 1, M] is True at pages that are read by their score; `bias` [B, H, 1, M] is
    infinity for pages that are always read, and minus infinity where there is no page. `others`
    [B, H, 1, M] is True where there is no full page; None = nowhere. A KV head reads up to `slots`
    pages, or `limits` [B, H]; None = all heads read `slots`. `reads_all`: every page is to be read.
    `by_age` [B, H, 1, M] lists the pages of several stores, the oldest first; None = they are in this
    order.
    """

    candidates: list[Candidates]
    bias: Tensor
    is_free: Tensor
    others: Tensor | None
    slots: int
    limits: Tensor | None
    reads_all: bool
    by_age: Tensor | None

    def tensors(self) -> Iterator[Tensor]:
        for candidates in self.candidates:
            yield from candidates.tensors()
        yield from (self.bias, self.is_free)
        yield from (
            tensor for tensor in (self.others, self.limits, self.by_age) if tensor is not None
        )
