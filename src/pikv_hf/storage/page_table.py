"""The page table of one layer, which stores tokens and chooses none.

Shapes: R rows, H KV heads, T tokens, S pages, P tokens a page, D head dim.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeIs

from .codec import PageCodec, encoded, flat_tokens
from .cutting import first_places, paged, zeroed_behind
from .finite import are_finite, refuse_if_not
from .incoming_pages import IncomingPages
from .page_list import Digest
from .page_writer import PageWriter
from .places import NewPages, OnePlace, Places
from .ragged_pages import RaggedPages, together
from .room import NO_ROOM, Room
from .token_table import TokenTable
from .uniform_pages import UniformPages
from .uniform_span import UniformSpan

# What routers and placements read of the tokens of a page.
LABELS = ("experts", "weights")
# From this many pages of a KV head on, a pool has pages of full size, even if the last is partial.
POOLED = 8


class PageTable:
    """The pages of one layer, in uniform slabs and ragged pools; codes are never changed.

    Each of the `places` has slabs of its own, to which new pages are dealt.
    """

    def __init__(
        self,
        codec: PageCodec,
        page_size: int,
        places: Places | None = None,
        digest: Digest | None = None,
    ) -> None:
        """Make an empty table; None = its pages are on the device of the layer.

        `digest` makes what a router reads of pages; None = nothing.
        """
        self.codec = codec
        self.page_size = page_size
        self.places = OnePlace() if places is None else places
        self.digest = digest
        self._of_places: list[list[UniformPages | RaggedPages]] = [
            [] for _ in range(self.places.count)
        ]
        # Pages of a KV head dealt so far, evicted ones included.
        self._dealt = 0
        self._unread: list[Tensor] = []

    @property
    def slabs(self) -> list[UniformPages | RaggedPages]:
        """The slabs of all places."""
        if len(self._of_places) == 1:
            return self._of_places[0]
        return [slab for slabs in self._of_places for slab in slabs]

    def of_place(self, place: int) -> list[UniformPages | RaggedPages]:
        """Return the slabs of a place."""
        return self._of_places[place]

    def _drop_unless(self, keep: Callable[[UniformPages | RaggedPages], Any]) -> None:
        """Drop the slabs for which `keep` is not true."""
        self._of_places = [[slab for slab in slabs if keep(slab)] for slabs in self._of_places]

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
        known = span.without_codes().without("keys", "values", "valid")
        positions = TokenTable({"positions": known["positions"].to(torch.int32)})
        known = positions.with_columns(known.without("positions"))
        choice = None if codes else self.codec.assign(**states, queries=queries)
        if choice is None and not in_pools:
            fields = codes or encoded(self.codec, **states, queries=queries)
            pages = UniformSpan(fields, known, lengths, size)
            for place, part in self._dealt_uniform(pages, sample):
                self._writer(place, sample, batch, room).write_uniform(part, rows)
            return
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
        for place, part in self._dealt_pooled(new):
            self._writer(place, sample, batch, room).write_pooled(part, choice)

    def _writer(self, place: int, sample: Tensor, batch: int, room: Room) -> PageWriter:
        """Return the writer of the pages of a place, for pages like `sample`."""
        tiers = self.places.tiers(place, sample.device)
        if room.tokens is not None:
            room = replace(room, tokens=-(-room.tokens // self.places.count))
        slabs = self._of_places[place]
        return PageWriter(self.codec, tiers, slabs, batch, room, self.digest)

    def _dealt_uniform(
        self, pages: UniformSpan, sample: Tensor
    ) -> Iterator[tuple[int, UniformSpan]]:
        """Yield the places, and for each the pages that are dealt to it."""
        if self.places.count == 1:
            yield 0, pages
            return
        count = sample.shape[2]
        filled = torch.full((1, 1, count), pages.size)
        if self.places.by_experts:
            counts = torch.tensor(pages.lengths)[:, None, None]
            filled = (counts - pages.size * torch.arange(count)).clamp(0, pages.size)
        labels = {k: paged(pages.known[k], pages.size) for k in LABELS if k in pages.known}
        owner = self._deal(filled, labels, sample.shape[1]).cpu()
        self._dealt += count
        for place in range(self.places.count):
            part = pages.select(owner[:, 0] == place)
            if part is not None:
                yield place, part

    def _dealt_pooled(self, new: IncomingPages) -> Iterator[tuple[int, IncomingPages]]:
        """Yield the places, and for each the pages with the `lengths` that are dealt to it."""
        if self.places.count == 1:
            yield 0, new
            return
        owner = self._deal(new.lengths, {k: new.known[k] for k in LABELS if k in new.known}, 1)
        before = self._num_pages()
        for place in range(self.places.count):
            yield place, replace(new, lengths=new.lengths * (owner == place))
        self._dealt += self._num_pages() - before

    def _deal(self, filled: Tensor, labels: dict[str, Tensor], heads: int) -> Tensor:
        """Deal pages, each entry of `filled` for the pages of `heads` KV heads."""
        loads = tuple(sum(x.page_count for x in slabs) // heads for slabs in self._of_places)
        return self.places.deal(NewPages(filled, self._dealt, loads, **labels))

    def _num_pages(self) -> int:
        return sum(slab.page_count for slab in self.slabs)

    def is_limited(self, device: torch.device) -> bool:
        """Return True if a tier for pages of a layer on `device` has a limit."""
        tiers = (self.places.tiers(place, device) for place in range(self.places.count))
        return any(tier.limit is not None for each in tiers for tier in each)

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
        """Decode the tokens of batch rows of one signature, the oldest first.

        All ranks that share the cache must call this together.
        """
        with self._fetched():
            return [span.without_codes() for span in self._spans(rows, with_values=True)]

    @contextlib.contextmanager
    def _fetched(self) -> Generator[None, None, None]:
        """Let slabs of other ranks have their encoded pages, which are fetched, within the block."""
        exchange, slabs = self.places.exchange, self.slabs
        if exchange is None or not slabs:
            yield
            return
        held = [slab.fields for slab in slabs]
        owners = [place for place, own in enumerate(self._of_places) for _ in own]
        fetched = exchange.fields(held, owners, slabs[0].home)
        for slab, fields in zip(slabs, fetched, strict=True):
            slab.set_fields(fields)
        try:
            yield
        finally:
            for slab, fields in zip(slabs, held, strict=True):
                slab.set_fields(fields)

    def _spans(self, rows: list[int], *, with_values: bool) -> list[TokenTable]:
        slabs = self._read_by(rows[0])
        uniform = [slab for slab in slabs if isinstance(slab, UniformPages)]
        spans = [slab.span(rows, with_values=with_values) for slab in uniform]
        if len(spans) > 1 and self.places.count > 1:
            spans = [functools.reduce(TokenTable.followed_by, spans).in_order()]
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
        `with_values`, or if there are no codes from which to seal again. All ranks that share the
        cache must call this together.
        """
        taken, with_values = [], with_values or not self.codec.is_per_token
        with self._fetched():
            for rows in groups:
                spans = self._spans(rows, with_values=with_values)
                taken.append(functools.reduce(TokenTable.followed_by, spans) if spans else None)
        for slab in self.slabs:
            slab.drop_readers({row for rows in groups for row in rows})
        self._drop_unless(lambda slab: slab.readers)
        self._forget_unread_rows()
        return taken

    def crop(self, position: int) -> None:
        """Drop every token from column `position` on. Only for pages in order of position."""
        for slab in self.slabs:
            slab.crop(position)
        self._drop_unless(lambda slab: slab.page_count)

    def map_rows(self, source: list[int], *, free: bool) -> None:
        """Let new batch row i read the pages of old batch row `source[i]`, without a copy.

        If `free`, pages that no row reads any more are freed.
        """
        for slab in self.slabs:
            slab.map_rows(source)
        self._drop_unless(lambda slab: slab.readers)
        if free:
            self._forget_unread_rows()

    def _forget_unread_rows(self) -> None:
        """Free the pages that no batch row reads, and the slabs that have no others."""
        for slab in self.slabs:
            slab.forget_unread_rows()
        self._drop_unless(lambda slab: slab.page_count)

    def clear(self) -> None:
        """Drop all pages."""
        self._of_places = [[] for _ in self._of_places]
        self._dealt, self._unread = 0, []

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
