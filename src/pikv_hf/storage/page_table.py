"""The page table of one layer, which stores tokens and chooses none.

Shapes: R rows, H KV heads, T tokens, S pages, P tokens a page, D head dim.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import TypeIs

from .codec import PageCodec, check_states, encoded, flat_tokens
from .cutting import first_places, paged, zeroed_behind
from .incoming_pages import EncodedPages, IncomingPages
from .memory import is_own
from .ragged_pages import RaggedPages, together
from .room import MERGED, NO_ROOM, SPARE, Room, grown_pages
from .tiers import Tier, near
from .token_table import TokenTable
from .uniform_pages import UniformPages

# From this many pages of a KV head on, a pool has pages of full size, even if the last is partial.
POOLED = 8
# Pages encoded at a time for a pool; pages already encoded that are copied at a time, if no tier
# has a limit.
PAGES_ENCODED, PAGES_MOVED = 16, 256


class PageTable:
    """The pages of one layer, in uniform slabs and ragged pools; codes are never changed."""

    def __init__(
        self, codec: PageCodec, page_size: int, place: Callable[[Tensor], list[Tier]] = near
    ) -> None:
        """Make an empty table; `place(tensor)` lists the tiers that its pages fill in order."""
        self.codec = codec
        self.page_size = page_size
        self.place = place
        self.tiers: list[Tier] = []
        self.slabs: list[UniformPages | RaggedPages] = []

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
        self.tiers = self.place(sample)
        known = span.without_codes().without("keys", "values", "valid")
        positions = TokenTable({"positions": known["positions"].to(torch.int32)})
        known = positions.with_columns(known.without("positions"))
        choice = None if codes else self.codec.assign(**states, queries=queries)
        if choice is None and not in_pools:
            fields = codes or encoded(self.codec, **states, queries=queries)
            return self._append_uniform(fields, known, rows, batch, room, lengths, size)
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
        self._append_pooled(new, choice, batch, room)

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
            check_states(self.codec, span["keys"], span["values"])
        return {name: paged(span[name], size) for name in ("keys", "values")}

    def apart(self, span: TokenTable, queries: Tensor | None = None) -> "PageTable":
        """Return a new table of `span` alone, with pages encoded as `append` would encode them."""
        table, rows = PageTable(self.codec, self.page_size), span["keys"].shape[0]
        table.append(span, list(range(rows)), rows, queries)
        return table

    def _append_uniform(
        self,
        fields: dict[str, Tensor],
        known: TokenTable,
        rows: list[int],
        batch: int,
        room: Room,
        lengths: list[int],
        size: int,
    ) -> None:
        """Store pages of `size` tokens; each head of row r has `lengths[r]` tokens in them.

        Pages fill the last slab, then new slabs, one in each tier that has room.
        """
        slab = self.slabs[-1] if self.slabs else None
        heads, pages = next(iter(fields.values())).shape[1:3]
        grows = len(rows) == batch and not any(n % size for n in lengths)
        start = 0
        is_alike = isinstance(slab, UniformPages) and slab.page_size == size
        if is_alike and (free := slab.free_pages(known, rows, lengths)):
            start = min(free, pages)
            slab.write(
                {k: t.narrow(2, 0, start) for k, t in fields.items()},
                known.narrow(0, min(start * size, len(known))),
                [min(n, start * size) for n in lengths],
            )
            if start == pages:
                return
        page_bytes = sum(t.nbytes // pages for t in (*fields.values(), *known.tensors.values()))
        for tier in self.tiers:
            free = self._free(tier, fields, 2)
            count = min(free, pages - start)
            if count <= 0:
                continue
            wide = count
            if grows and start + count == pages:
                spare = 0 if all(map(is_own, fields.values())) else count // SPARE
                follow = max((room.tokens or 0) // size, spare)
                grown, spare_room = self._grown(batch * heads, tier), tier.room(room)
                wide = min(spare_room.pages(count, follow, grown, page_bytes), free)
            tokens = min(count * size, len(known) - start * size)
            slab = UniformPages(
                codec=self.codec,
                tier=tier,
                fields={k: tier.hold(t.narrow(2, start, count), wide) for k, t in fields.items()},
                meta=known.narrow(start * size, tokens).with_room(wide * size),
                lengths=[max(min(n - start * size, tokens), 0) for n in lengths],
                page_size=size,
                readers=list(rows),
                stored=list(range(len(rows))),
            )
            self.slabs.append(self._merged(slab) if grows and tier.merges else slab)
            start += count

    def _merged(self, newest: UniformPages) -> UniformPages:
        """Remove the last slabs that are not much larger, and return them joined with `newest`.

        Attention reads every slab by itself, so there should be few.
        """
        parts, pages = [newest], newest.capacity // newest.page_size
        while self.slabs:
            older = self.slabs[-1]
            if is_pool(older) or not older.can_precede(newest) or older.pages > MERGED * pages:
                break
            parts.insert(0, older)
            pages += older.pages
            self.slabs.pop()
        return newest if len(parts) == 1 else newest.joined(parts, pages)

    def _free(self, tier: Tier, fields: dict[str, Tensor], dim: int) -> int:
        """Return how many pages like `fields` fit in `tier`; dimension `dim` counts pages."""
        if tier.limit is None:
            return sys.maxsize
        used = sum(slab.nbytes for slab in self.slabs if slab.tier.name == tier.name)
        page_bytes = sum(t.nbytes // t.shape[dim] for t in fields.values())
        return (tier.limit - used) // page_bytes

    def _append_pooled(
        self, new: IncomingPages, choice: Tensor | None, batch: int, room: Room
    ) -> None:
        """Write each page into a pool of its codec; a new pool gets a share of the `room`.

        `choice` [R, H, S] is the index of the page's codec in `members`; None = not mixed.
        """
        members = self.codec.members
        if choice is None:
            members = tuple({self.codec.of_head(head): None for head in range(new.heads)})
            choice = torch.zeros_like(new.lengths)
            if len(members) > 1:
                choice = choice + torch.arange(new.heads, device=choice.device)[:, None]
        is_limited = any(tier.limit is not None for tier in self.tiers)
        size = PAGES_MOVED if new.codes and not is_limited else PAGES_ENCODED
        for number, member in enumerate(members):
            is_chosen = (choice == number) & (new.lengths > 0)
            unwritten = int(is_chosen.sum())
            for chosen, group in new.places(is_chosen):
                # In small portions, so that temporary copies are small.
                for at in chosen.split(size) if len(chosen) else ():
                    pages = new.encoded(member, at, group)
                    while len(pages):
                        room_of = functools.partial(
                            self._pool_room, room, pages, unwritten, batch * new.heads, len(members)
                        )
                        pool = self._open_pool(member, pages, batch, new.heads, room_of)
                        first, pages = pages.split(pool.free_pages(pages, batch))
                        pool.write(first)
                        unwritten -= len(first)

    def _open_pool(
        self,
        member: PageCodec,
        pages: EncodedPages,
        batch: int,
        heads: int,
        room_of: Callable[[Tier], int],
    ) -> RaggedPages:
        """Return the last pool of `member` if any of `pages` fits in it, else a new pool.

        `room_of(tier)` is the capacity in pages of a new pool in a tier.
        """
        for pool in reversed(self.slabs):
            is_alike = is_pool(pool) and pool.page_size == pages.page_size
            if is_alike and pool.codec == member:
                if pool.free_pages(pages, batch):
                    return pool
                break
        for tier in self.tiers:
            free = self._free(tier, pages.fields, 0)
            if free >= pages.group:
                break
        pool = RaggedPages.like(pages, member, tier, min(room_of(tier), free), batch, heads)
        self.slabs.append(pool)
        return pool

    def _pool_room(
        self, room: Room, pages: EncodedPages, unwritten: int, owners: int, members: int, tier: Tier
    ) -> int:
        """Return the capacity in pages of a new pool; `unwritten` pages are to be written now."""
        room = tier.room(room)
        known = (room.tokens or 0) // pages.page_size * owners // members
        page_bytes = sum(t.nbytes for t in pages.tensors()) // len(pages) * members
        if self.codec.is_mixed:  # the encodings of later pages are not known
            known = min(known, max(room.nbytes, 0) // page_bytes)
        return room.pages(unwritten, known, self._grown(owners, tier) * owners // 2, page_bytes)

    def _grown(self, owners: int, tier: Tier) -> int:
        """Return how many pages per owner (a KV head of a row) new memory in `tier` is made for."""
        held = sum(slab.page_count for slab in self.slabs) // owners
        # Room is never filled where rows are reordered or pages are shared.
        can_fill = all(slab.is_in_order() and not slab.is_forked for slab in self.slabs)
        return grown_pages(held, is_roomy=tier.is_roomy and can_fill)

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

    def take(self, rows: list[int], *, with_values: bool) -> TokenTable | None:
        """Remove and return the tokens of batch rows of one signature, decoded and with codes.

        Values are decoded if `with_values`, or if there are no codes from which to seal again.
        """
        taken, with_values = None, with_values or not self.codec.is_per_token
        for span in self._spans(rows, with_values=with_values):
            taken = span if taken is None else taken.followed_by(span)
        for slab in self.slabs:
            slab.drop_readers(set(rows))
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
        self.slabs = []

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
