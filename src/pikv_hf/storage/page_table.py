"""The page table of one layer, which stores tokens and chooses none.

Shapes: R rows, H KV heads, T tokens, S pages, P tokens a page, D head dim.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import TypeIs

from .codec import PageCodec, encoded, flat_tokens
from .cutting import first_places, paged, zeroed_behind
from .finite import are_finite, refuse_if_not
from .incoming_pages import IncomingPages
from .page_list import Digest
from .page_writer import PageWriter
from .ragged_pages import RaggedPages, together
from .room import NO_ROOM, Room
from .tiers import Tier, near
from .token_table import TokenTable
from .uniform_pages import UniformPages

# From this many pages of a KV head on, a pool has pages of full size, even if the last is partial.
POOLED = 8


class PageTable:
    """The pages of one layer, in uniform slabs and ragged pools; codes are never changed."""

    def __init__(
        self,
        codec: PageCodec,
        page_size: int,
        place: Callable[[Tensor], list[Tier]] = near,
        digest: Digest | None = None,
    ) -> None:
        """Make an empty table; `place(tensor)` lists the tiers that its pages fill in order.

        `digest` makes what a router reads of pages; None = nothing.
        """
        self.codec = codec
        self.page_size = page_size
        self.place = place
        self.digest = digest
        self.slabs: list[UniformPages | RaggedPages] = []
        self._unread: list[Tensor] = []

    def append(
        self,
        span: TokenTable,
        rows: list[int],
        batch: int,
        queries: Tensor | None = None,
        room: Room = NO_ROOM,
        lengths: list[int] | None = None,
    ) -> None:
        """Seal `span`, tokens of the batch rows `rows` out of `batch` rows.

        `span` has `keys` and `values`, or codes as `take` and `encoded` return them. The first
        `lengths[r]` tokens of row r are sealed; None = all. If heads have different numbers of
        tokens, `valid` marks the tokens, which come first in each head. `queries` [R, H, Q, D] are
        the newest queries of the rows, if the compressor uses any. New memory includes the `room`.

        Raises:
            ValueError: the compressor cannot store these tokens.
        """
        lengths = lengths or [len(span)] * len(rows)
        is_uneven, has_pools = min(lengths) < len(span), any(map(is_pool, self.slabs))
        if is_uneven:
            span = zeroed_behind(span, lengths)
        in_pools = has_pools or "valid" in span
        size = self._size(len(span), in_pools=in_pools)
        codes = {name: paged(tensor, size) for name, tensor in span.codes().items()}
        states = {} if codes else self._states(span, size)
        sample = next(iter((codes or states).values()))
        tiers = self.place(sample)
        writer = PageWriter(self.codec, tiers, self.slabs, batch, room, self.digest)
        known = span.without_codes().without("keys", "values", "valid")
        positions = TokenTable({"positions": known["positions"].to(torch.int32)})
        known = positions.with_columns(known.without("positions"))
        choice = None if codes else self.codec.assign(**states, queries=queries)
        if choice is None and not in_pools:
            fields = codes or encoded(self.codec, **states, queries=queries)
            return writer.write_uniform(fields, known, rows, lengths, size)
        lead = sample.shape[:2]
        known = {
            name: paged(t.to(sample.device).expand(*lead, *t.shape[2:]), size)
            for name, t in known.tensors.items()
        }
        if "valid" in span:
            valid = span["valid"].to(sample.device)
        else:
            valid = first_places(lengths, len(span), sample.device)[:, None]
        filled = paged(valid.expand(*lead, -1), size).sum(-1)
        new = IncomingPages(states, codes, known, filled, rows, queries)
        writer.write_pooled(new, choice)

    def _size(self, tokens: int, *, in_pools: bool) -> int:
        """Return the page size for `tokens` tokens: smaller if the last page would not be full.

        Only tokens that are encoded one by one or without loss get smaller pages. In a slab, pages
        are as small as their number allows; in pools, where each KV head has a partial page, they
        have half the size, or 1/`POOLED` of the tokens if these are few.
        """
        is_per_token = self.codec.is_per_token or self.codec.is_lossless
        if not is_per_token or tokens % self.page_size == 0:
            return self.page_size
        if in_pools and tokens >= POOLED * self.page_size:
            return self.page_size
        if in_pools:
            is_large = tokens >= 2 * self.page_size
            return max(self.page_size // 2 if is_large else tokens // POOLED, 1)
        return -(-tokens // -(-tokens // self.page_size))

    def encoded(self, span: TokenTable) -> TokenTable:
        """Return `span` with its codes added, if the codec encodes each token by itself.

        Raises:
            ValueError: the compressor cannot store these tokens.
        """
        if not self.codec.is_per_token:
            return span
        fields = self.codec.encode(**self._states(span, self.page_size))
        return span.with_codes({k: flat_tokens(v, len(span)) for k, v in fields.items()})

    def _states(self, span: TokenTable, size: int) -> dict[str, Tensor]:
        """Check the `keys` and `values` of `span` and return them as pages of `size` tokens."""
        if not self.codec.is_lossless:
            finite = are_finite(span["keys"], span["values"])
            if finite.device.type == "cpu":
                refuse_if_not(finite.tolist(), self.codec)
            else:
                self._unread.append(finite)
        return {name: paged(span[name], size) for name in ("keys", "values")}

    def take_unread(self) -> list[Tensor]:
        """Remove and return flags [2], on accelerators: whether sealed keys and values were finite.

        On a CPU they are read, and states refused, before pages are written.
        """
        unread, self._unread = self._unread, []
        return unread

    def apart(self, span: TokenTable, queries: Tensor | None = None) -> "PageTable":
        """Return a new table of `span` alone, with pages encoded as `append` would encode them."""
        table, rows = PageTable(self.codec, self.page_size), span["keys"].shape[0]
        table.append(span, list(range(rows)), rows, queries)
        return table

    def bytes_with(self, nbytes: int) -> int:
        """Return the bytes of all pages after `nbytes` of pages were added, first in free room."""
        held = room = 0
        for slab in self.slabs:
            size = sum(tensor.nbytes for tensor in slab.tensors())
            held += size
            room += 0 if slab.is_forked else int(slab.room * size)
        return max(held, held - room + nbytes)

    def held(self, row: int) -> Tensor | None:
        """Return the tokens of each KV head of a batch row, [H] on the CPU; None = no tokens."""
        held = [slab.held()[slab.stored_of([row])[0]] for slab in self._read_by(row)]
        return torch.stack(held).sum(0) if held else None

    def _read_by(self, row: int) -> list[UniformPages | RaggedPages]:
        """Return the slabs that hold tokens of a batch row."""
        slabs = (slab for slab in self.slabs if row in slab.readers)
        return [
            slab
            for slab in slabs
            if isinstance(slab, RaggedPages) or slab.lengths[slab.stored_of([row])[0]]
        ]

    def signature(self, row: int) -> tuple[int, ...]:
        """Return the signature of a batch row; rows of one signature hold equally many tokens."""
        uniform, in_pools = [], 0
        for number, slab in enumerate(self.slabs):
            if row in slab.readers:
                held = slab.held()[slab.stored_of([row])[0]]
                if isinstance(slab, UniformPages):
                    uniform += [number, int(held[0])] if held[0] else []
                else:
                    in_pools += int(held.sum())
        return (*uniform, in_pools)

    def spans(self, rows: list[int]) -> list[TokenTable]:
        """Decode the tokens of batch rows of one signature, the oldest first."""
        return [span.without_codes() for span in self._spans(rows, with_values=True)]

    def _spans(self, rows: list[int], *, with_values: bool) -> list[TokenTable]:
        slabs = self._read_by(rows[0])
        uniform = [slab for slab in slabs if isinstance(slab, UniformPages)]
        spans = [slab.span(rows, with_values=with_values) for slab in uniform]
        # Rows that hold equally many tokens in pools may hold them in different pools.
        pools = [p for p in self.slabs if is_pool(p) and not set(rows).isdisjoint(p.readers)]
        if not pools:
            return spans
        # The codes of a mixed codec are of no use: it may choose another encoding next time.
        with_codes = self.codec.is_per_token
        return [*spans, together(pools, rows, with_codes=with_codes, with_values=with_values)]

    def take(self, groups: list[list[int]], *, with_values: bool) -> list[TokenTable | None]:
        """Remove and return the tokens of each group of batch rows, decoded and with codes.

        The rows of a group have one signature; None = they have no tokens. Values are decoded if
        `with_values`, or if there are no codes from which to seal again.
        """
        taken, with_values = [], with_values or not self.codec.is_per_token
        for rows in groups:
            spans = self._spans(rows, with_values=with_values)
            taken.append(functools.reduce(TokenTable.followed_by, spans) if spans else None)
        for slab in self.slabs:
            slab.drop_readers({row for rows in groups for row in rows})
        self.slabs = [slab for slab in self.slabs if slab.readers]
        for slab in self.slabs:
            slab.forget_unread_rows()
        return taken

    def crop(self, position: int) -> None:
        """Drop every token from column `position` on. Only for pages in order of position."""
        for slab in self.slabs:
            slab.crop(position)
        self.slabs = [slab for slab in self.slabs if slab.page_count]

    def map_rows(self, source: list[int], *, free: bool) -> None:
        """Let new batch row i read the pages of old batch row `source[i]`, without a copy.

        If `free`, pages that no row reads any more are freed.
        """
        for slab in self.slabs:
            slab.map_rows(source)
        self.slabs = [slab for slab in self.slabs if slab.readers]
        if free:
            for slab in self.slabs:
                slab.forget_unread_rows()

    def clear(self) -> None:
        """Drop all pages."""
        self.slabs, self._unread = [], []

    def mark_forked(self) -> None:
        """Mark the pages as shared with another table: new pages are then written to new memory."""
        for slab in self.slabs:
            slab.mark_forked()

    def read_ahead(self) -> None:
        """Announce that all pages will be read soon."""
        for slab in self.slabs:
            slab.tier.read_ahead(slab.fields.values())

    def tensors(self) -> Iterator[Tensor]:
        for slab in self.slabs:
            yield from slab.tensors()
        yield from self.codec.tensors()


def is_pool(slab: UniformPages | RaggedPages) -> TypeIs[RaggedPages]:
    return isinstance(slab, RaggedPages)
