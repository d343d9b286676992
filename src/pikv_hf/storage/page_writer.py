"""Writing of encoded pages into the stores of a table: free room first, then new stores.

Shapes: R rows, H KV heads, S pages.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import PageCodec
from .incoming_pages import EncodedPages, IncomingPages
from .memory import is_own, trim_heap
from .page_list import Digest, digested
from .ragged_pages import RaggedPages
from .room import MERGED, SPARE, Room, grown_pages
from .tiers import Tier
from .uniform_pages import UniformPages
from .uniform_span import UniformSpan

# Pages encoded at a time for a pool; pages already encoded that are copied at a time, if no tier
# has a limit.
PAGES_ENCODED, PAGES_MOVED = 16, 256
# Bytes of stores that were copied into one before the heap is trimmed, in which they leave holes.
TRIMMED = 2**22


@dataclass(frozen=True)
class PageWriter:
    """Writes pages of `batch` rows, encoded by members of `codec`, to the end of `slabs`.

    New stores are made in the first of `tiers` that has room, with `room` for later pages. `digest`
    makes what a router reads of pages.
    """

    codec: PageCodec
    tiers: list[Tier]
    slabs: list[UniformPages | RaggedPages]
    batch: int
    room: Room
    digest: Digest | None = None

    def write_uniform(self, new: UniformSpan, rows: list[int]) -> None:
        """Write pages of the batch `rows`.

        Pages fill the last slab, then new slabs, one in each tier that has room.
        """
        fields, known, lengths, size = new.fields, new.known, new.lengths, new.size
        slab = self.slabs[-1] if self.slabs else None
        heads, pages = next(iter(fields.values())).shape[1:3]
        digests = digested(self.digest, self.codec, fields, known, size)
        grows = len(rows) == self.batch and not any(n % size for n in lengths)
        start = 0
        is_alike = isinstance(slab, UniformPages) and slab.page_size == size
        if is_alike and (free := slab.free_pages(known, rows, lengths)):
            start = min(free, pages)
            slab.write(
                {k: t.narrow(2, 0, start) for k, t in fields.items()},
                known.narrow(0, min(start * size, len(known))),
                [min(n, start * size) for n in lengths],
                digests.narrow(0, start),
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
                follow = max((self.room.tokens or 0) // size, spare)
                grown, room = self._grown(self.batch * heads, tier), tier.room(self.room)
                wide = min(room.pages(count, follow, grown, page_bytes), free)
            tokens = min(count * size, len(known) - start * size)
            slab = UniformPages(
                codec=self.codec,
                tier=tier,
                fields={k: tier.hold(t.narrow(2, start, count), wide) for k, t in fields.items()},
                meta=known.narrow(start * size, tokens).with_room(wide * size),
                digests=digests.narrow(start, count).with_room(wide),
                lengths=[max(min(n - start * size, tokens), 0) for n in lengths],
                page_size=size,
                readers=list(rows),
                stored=list(range(len(rows))),
            )
            self.slabs.append(self._merged(slab) if grows and tier.merges else slab)
            start += count

    def _merged(self, newest: UniformPages) -> UniformPages:
        """Remove the last slabs that are not much larger, and return them joined with `newest`.

        Attention reads every slab by itself, so there should be few. If a router selects among all
        pages, they are joined whatever their size.
        """
        parts, pages, nbytes = [newest], newest.capacity // newest.page_size, 0
        while self.slabs:
            older = self.slabs[-1]
            if (
                isinstance(older, RaggedPages)
                or not older.can_precede(newest)
                or (self.digest is None and older.pages > MERGED * pages)
            ):
                break
            parts.insert(0, older)
            pages += older.pages
            nbytes += older.nbytes
            self.slabs.pop()
        if len(parts) == 1:
            return newest
        joined = newest.joined(parts, pages)
        if nbytes >= TRIMMED and next(joined.tensors()).device.type == "cpu":
            trim_heap()
        return joined

    def _free(self, tier: Tier, fields: dict[str, Tensor], dim: int) -> int:
        """Return how many pages like `fields` fit in `tier`; dimension `dim` counts pages."""
        if tier.limit is None:
            return sys.maxsize
        used = sum(slab.nbytes for slab in self.slabs if slab.tier.name == tier.name)
        page_bytes = sum(t.nbytes // t.shape[dim] for t in fields.values())
        return (tier.limit - used) // page_bytes

    def write_pooled(self, new: IncomingPages, choice: Tensor | None) -> None:
        """Write each page into a pool of its codec; a new pool gets a share of the room.

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
            places = list(new.places(is_chosen))
            unwritten = sum(len(chosen) for chosen, _ in places)
            for chosen, group in places:
                # In small portions, so that temporary copies are small.
                for at in chosen.split(size) if len(chosen) else ():
                    pages = new.encoded(member, at, group, self.digest)
                    while len(pages):
                        room_of = functools.partial(
                            self._pool_room, pages, unwritten, self.batch * new.heads, len(members)
                        )
                        pool = self._open_pool(member, pages, new.heads, room_of)
                        first, pages = pages.split(pool.free_pages(pages, self.batch))
                        pool.write(first)
                        unwritten -= len(first)

    def _open_pool(
        self,
        member: PageCodec,
        pages: EncodedPages,
        heads: int,
        room_of: Callable[[Tier], int],
    ) -> RaggedPages:
        """Return the last pool of `member` if any of `pages` fits in it, else a new pool.

        `room_of(tier)` is the capacity in pages of a new pool in a tier.
        """
        for pool in reversed(self.slabs):
            is_alike = isinstance(pool, RaggedPages) and pool.page_size == pages.page_size
            if is_alike and pool.codec == member:
                if pool.free_pages(pages, self.batch):
                    return pool
                break
        for tier in self.tiers:
            free = self._free(tier, pages.fields, 0)
            if free >= pages.group:
                break
        pool = RaggedPages.like(pages, member, tier, min(room_of(tier), free), self.batch, heads)
        self.slabs.append(pool)
        return pool

    def _pool_room(
        self, pages: EncodedPages, unwritten: int, owners: int, members: int, tier: Tier
    ) -> int:
        """Return the capacity in pages of a new pool; `unwritten` pages are to be written now."""
        room = tier.room(self.room)
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
