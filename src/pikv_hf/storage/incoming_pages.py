"""Tokens and pages on their way into pools.

Shapes: R rows, H KV heads, S pages, N pages of any of them, P tokens a page, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import PageCodec, encoded
from .token_table import TokenTable

# Pages of one owner that are read as if they were a longer one: fewer and larger products.
GROUP = 8


@dataclass(frozen=True)
class EncodedPages:
    """N pages for a pool: `fields` and `meta` [N, ...], `owner` and `lengths` [N] as there.

    `group` after `group` has one owner, and is full; 1 = they may be of any length.
    """

    fields: dict[str, Tensor]
    meta: TokenTable
    owner: Tensor
    lengths: Tensor
    group: int

    def __len__(self) -> int:
        return len(self.owner)

    def split(self, count: int) -> "tuple[EncodedPages, EncodedPages]":
        """The first `count` pages, whole groups of them, and the others."""
        first, other = (
            EncodedPages(
                {name: field[part] for name, field in self.fields.items()},
                TokenTable({name: tensor[part] for name, tensor in self.meta.tensors.items()}),
                self.owner[part],
                self.lengths[part],
                self.group,
            )
            for part in (slice(count), slice(count, None))
        )
        return first, other

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.fields.values(), *self.meta.tensors.values(), self.owner, self.lengths)


@dataclass(frozen=True)
class IncomingPages:
    """Tokens of batch rows `rows` that are to go into pools, page by page, each row and head apart.

    `states`: their `keys` [R, H, S, P, Dk] and `values`, or, if they are encoded already, `codes`
    [R, H, S, P, ...] by name; in `known` [R, H, S, P, ...] what is known of them; `lengths`
    [R, H, S], how many are valid, the first ones of a page; `queries` [R, H, Q, Dk], if the
    compressor asks for any.
    """

    states: dict[str, Tensor]
    codes: dict[str, Tensor]
    known: dict[str, Tensor]
    lengths: Tensor
    rows: list[int]
    queries: Tensor | None

    @property
    def heads(self) -> int:
        return self.lengths.shape[1]

    @property
    def page_size(self) -> int:
        return self.known["positions"].shape[3]

    def places(self, mine: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Of the pages `mine` [R, H, S] the places [N, 3] in R, H and S of those to be read in one

        way, and their group: full pages `GROUP` by `GROUP`, then the other ones.
        """
        full = mine & (self.lengths == self.page_size)
        grouped = full & (full.cumsum(-1) <= full.sum(-1, keepdim=True) // GROUP * GROUP)
        yield grouped.nonzero(), GROUP
        yield (mine & ~grouped & (self.lengths > 0)).nonzero(), 1

    def encoded(self, codec: PageCodec, at: Tensor, group: int) -> EncodedPages:
        """The pages `at` [N, 3], as `compressor` encodes them."""
        row, head, page = at.unbind(1)
        return EncodedPages(
            fields=self._fields(codec, row, head, page),
            meta=TokenTable({name: t[row, head, page][:, None] for name, t in self.known.items()}),
            owner=torch.tensor(self.rows, device=row.device)[row] * self.heads + head,
            lengths=self.lengths[row, head, page].to(torch.int32),
            group=group,
        )

    def _fields(
        self, codec: PageCodec, row: Tensor, head: Tensor, page: Tensor
    ) -> dict[str, Tensor]:
        if self.codes:
            return {name: tensor[row, head, page] for name, tensor in self.codes.items()}
        wanted = self.queries is not None and codec.observed_queries
        asked = self.queries[row, head][:, None] if wanted else None
        states = {k: t[row, head, page][:, None, None] for k, t in self.states.items()}
        fields = encoded(codec, **states, queries=asked)
        return {name: tensor[:, 0, 0] for name, tensor in fields.items()}
