"""Tokens and pages on their way into pools.

Shapes: R rows, H KV heads, S pages, N pages of any row and head, P tokens a page, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import PageCodec, encoded
from .memory import on_device
from .page_list import Digest, digested
from .token_table import TokenTable

# Pages of one row and KV head that are read as one long page, for fewer and larger products.
GROUP = 8


@dataclass(frozen=True)
class EncodedPages:
    """N encoded pages for a pool; the tensors are as in `RaggedPages`, of capacity N.

    Each `group` adjacent pages have one owner and are full; if `group` is 1, pages may be partial.
    """

    fields: dict[str, Tensor]
    meta: TokenTable
    digests: TokenTable
    owner: Tensor
    lengths: Tensor
    group: int

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def page_size(self) -> int:
        return self.meta["positions"].shape[2]

    def split(self, count: int) -> "tuple[EncodedPages, EncodedPages]":
        """Split into the first `count` pages, which must be whole groups, and the rest."""
        first, other = (
            EncodedPages(
                {name: field[part] for name, field in self.fields.items()},
                *(
                    TokenTable({name: tensor[part] for name, tensor in table.tensors.items()})
                    for table in (self.meta, self.digests)
                ),
                self.owner[part],
                self.lengths[part],
                self.group,
            )
            for part in (slice(count), slice(count, None))
        )
        return first, other

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.fields.values(), *self.meta.tensors.values())
        yield from (*self.digests.tensors.values(), self.owner, self.lengths)


@dataclass(frozen=True)
class IncomingPages:
    """Tokens of the batch rows `rows` that go into pools, cut into pages.

    `states` has `keys` [R, H, S, P, Dk] and `values`; for tokens that are encoded already, `codes`
    has fields [R, H, S, P, ...] instead. `known` [R, H, S, P, ...] is other data of the tokens,
    such as positions. The first `lengths` [R, H, S] tokens of a page are valid. `queries`
    [R, H, Q, Dk] are the newest queries, if the compressor uses any.
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

    def places(self, chosen: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield the pages marked in `chosen` [R, H, S] as (indices [N, 3] into R, H, S; group size).

        First the full pages that form groups of `GROUP` pages of one row and head, then the others.
        """
        full = chosen & (self.lengths == self.page_size)
        grouped = full & (full.cumsum(-1) <= full.sum(-1, keepdim=True) // GROUP * GROUP)
        yield grouped.nonzero(), GROUP
        yield (chosen & ~grouped & (self.lengths > 0)).nonzero(), 1

    def encoded(
        self, codec: PageCodec, at: Tensor, group: int, digest: Digest | None
    ) -> EncodedPages:
        """Encode the pages with indices `at` [N, 3], and make their digests."""
        row, head, page = at.unbind(1)
        fields = self._fields(codec, row, head, page)
        meta = TokenTable({name: t[row, head, page][:, None] for name, t in self.known.items()})
        alone = {name: tensor[:, None, None] for name, tensor in fields.items()}
        digests = digested(digest, codec, alone, meta, self.page_size)
        return EncodedPages(
            fields=fields,
            meta=meta,
            digests=TokenTable({name: tensor[:, 0, 0] for name, tensor in digests.tensors.items()}),
            owner=on_device(tuple(self.rows), row.device)[row] * self.heads + head,
            lengths=self.lengths[row, head, page].to(torch.int32),
            group=group,
        )

    def _fields(
        self, codec: PageCodec, row: Tensor, head: Tensor, page: Tensor
    ) -> dict[str, Tensor]:
        if self.codes:
            return {name: tensor[row, head, page] for name, tensor in self.codes.items()}
        uses_queries = self.queries is not None and codec.observed_queries
        queries = self.queries[row, head][:, None] if uses_queries else None
        states = {k: t[row, head, page][:, None, None] for k, t in self.states.items()}
        fields = encoded(codec, **states, queries=queries)
        return {name: tensor[:, 0, 0] for name, tensor in fields.items()}
