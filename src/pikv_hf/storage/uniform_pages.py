"""Pages of rows whose KV heads have equally many tokens; rows may differ.

Shapes: R stored rows, H KV heads, S pages, P tokens a page, D head dim.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from pikv_kernels import lowest_score, new_mask
from torch import Tensor

from .codec import PageCodec, attend_masked, cover, decoded, flat_tokens
from .gather import select_pages, taken
from .memory import is_writable, on_device
from .page_list import PageList
from .row_map import PageStore, Partial
from .token_table import TokenTable


class Block(NamedTuple):
    """Encoded pages [R, H, s, ...] of `tokens` tokens, which begin at place `start` of each row."""

    fields: dict[str, Tensor]
    tokens: int
    start: int


@dataclass(kw_only=True)
class UniformPages(PageStore):
    """Pages of R stored rows, whose KV heads have equally many tokens.

    `fields` [R, H, S, ...] are the encoded pages; `meta` [R or 1, H or 1, S * P, ...] is other data
    of their tokens, such as `positions`, and `digests` [R or 1, H or 1, S, ...] what a router reads
    of them. The first `lengths[r]` tokens of row r are valid. Places up to the longest row are read,
    but masked in shorter rows.
    """

    codec: PageCodec
    meta: TokenTable
    digests: TokenTable
    lengths: list[int]
    page_size: int
    _whole: Block | None = field(default=None, repr=False)
    _list: PageList | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """True if all rows have equally many tokens."""
        return min(self.lengths) == self.length

    @property
    def _sample(self) -> Tensor:
        return next(iter(self.fields.values()))

    @property
    def home(self) -> torch.device:
        return self.meta["positions"].device

    @property
    def rows(self) -> int:
        return self._sample.shape[0]

    @property
    def capacity(self) -> int:
        return self._sample.shape[2] * self.page_size

    @property
    def pages(self) -> int:
        """Number of pages of the longest row."""
        return -(-self.length // self.page_size)

    @property
    def page_count(self) -> int:
        return sum(-(-n // self.page_size) for n in self.lengths) * self._sample.shape[1]

    @property
    def page_bytes(self) -> int:
        return self.nbytes // math.prod(self._sample.shape[:3])

    @property
    def room(self) -> float:
        return 1 - self.pages * self.page_size / self.capacity

    def held(self) -> Tensor:
        return torch.tensor(self.lengths)[:, None].expand(-1, self._sample.shape[1])

    def free_pages(self, meta: TokenTable, rows: list[int], lengths: list[int]) -> int:
        """Return how many pages can be appended to each of the batch `rows`.

        The tokens to append, `lengths[r]` of row r, have other data like `meta`.
        """
        # Data shared by all rows or heads can be written where each has its own, not vice versa.
        alike = meta.tensors.keys() == self.meta.tensors.keys() and all(
            new in (1, held)
            for name in meta.tensors
            for new, held in zip(meta[name].shape[:2], self.meta[name].shape[:2], strict=True)
        )
        is_even = self.is_even and min(lengths) == max(lengths)
        own = (*self.meta.tensors.values(), *self.digests.tensors.values())
        is_per_row = all(tensor.shape[0] == self.rows for tensor in own)
        is_cut = any(n % self.page_size for n in (*self.lengths, *(() if is_even else lengths)))
        is_free = (
            alike
            and (is_even or is_per_row)
            and not is_cut
            and not self.is_forked
            and self.readers == rows
            and self.is_in_order()
            and is_writable(self._sample)
        )
        return (self.capacity - self.length) // self.page_size if is_free else 0

    def can_precede(self, newer: "UniformPages") -> bool:
        """Return True if these pages and `newer` ones can be joined in one store."""
        leads = [{k: t.shape[:2] for k, t in s.meta.tensors.items()} for s in (self, newer)]
        return (
            (self.codec, self.tier, self.page_size, self.readers, leads[0])
            == (newer.codec, newer.tier, newer.page_size, newer.readers, leads[1])
            and not (self.is_forked or any(n % self.page_size for n in self.lengths))
            and self.is_in_order()
        )

    def joined(self, parts: "list[UniformPages]", pages: int) -> "UniformPages":
        """Move the pages of `parts`, which are empty then, to a store for `pages` pages of each row."""
        joined = replace(
            self,
            fields={
                k: self.tier.empty(t, *t.shape[:2], pages, *t.shape[3:])
                for k, t in self.fields.items()
            },
            meta=self.meta.narrow(0, 0).with_room(pages * self.page_size),
            digests=self.digests.narrow(0, 0).with_room(pages),
            lengths=[0] * self.rows,
            _index={},
        )
        for part in parts:
            fields = {name: tensor[:, :, : part.pages] for name, tensor in part.fields.items()}
            meta = part.meta.narrow(0, part.pages * self.page_size)
            joined.write(fields, meta, part.lengths, part.digests.narrow(0, part.pages))
            part.changed()
            part.fields.clear()  # frees its memory, which the next part is copied into
        return joined

    def write(
        self,
        fields: dict[str, Tensor],
        meta: TokenTable,
        lengths: list[int],
        digests: TokenTable,
    ) -> None:
        """Append pages [R, H, s, ...] with other data of them: `lengths[r]` tokens of row r."""
        if self.is_even and min(lengths) == max(lengths):
            for name, tensor in fields.items():
                self.fields[name].narrow(2, self.pages, tensor.shape[2]).copy_(tensor)
            self.meta.write(self.length, meta)
            if digests.tensors:
                self.digests.write(self.pages, digests)
        else:
            self._write_behind_each_row(fields, meta, lengths, digests)
        self.lengths = [n + more for n, more in zip(self.lengths, lengths, strict=True)]
        self.changed()

    def _write_behind_each_row(
        self,
        fields: dict[str, Tensor],
        meta: TokenTable,
        lengths: list[int],
        digests: TokenTable,
    ) -> None:
        """Write the new pages of each row behind its last page."""
        size = self.page_size
        held, new = ([n // size for n in each] for each in (self.lengths, lengths))
        exposed = slice(self.pages, max(map(sum, zip(held, new, strict=True))))
        places = _places(tuple(held), tuple(new), self.home)
        paged = {k: t.unflatten(2, (-1, size)) for k, t in self.meta.tensors.items()}
        more = {k: t.unflatten(2, (-1, size)) for k, t in meta.tensors.items()}
        pairs = (self.fields, fields), (paged, more), (self.digests.tensors, digests.tensors)
        for all_held, all_new in pairs:
            for name, tensor in all_held.items():
                tensor[:, :, exposed] = 0  # masked places are read, too: they must be finite
                wide = all_new[name].expand(self.rows, *all_new[name].shape[1:])
                row, page, _ = (index.to(wide.device) for index in places)
                source = wide[row, :, page].to(tensor)
                row, _, target = (index.to(tensor.device) for index in places)
                tensor[row, :, target] = source

    def changed(self) -> None:
        super().changed()
        self._whole = self._list = None

    def keep_rows(self, used: Tensor) -> None:
        self.fields = {k: self.tier.select(v, used) for k, v in self.fields.items()}
        self.meta = self.meta.select_rows(used)
        self.digests = self.digests.select_rows(used)
        self.lengths = [self.lengths[row] for row in used.tolist()]

    def crop(self, position: int) -> None:
        columns = self.meta["positions"][:, 0, : self.length].cpu()
        valid = torch.arange(self.length) < torch.tensor(self.lengths)[:, None]
        self.lengths = ((columns < position) & valid).sum(1).tolist()
        self.changed()

    def attend(
        self, query: Tensor, scale: float, covered: Tensor | None = None
    ) -> Iterator[Partial]:
        shortest = min(self.lengths)
        for fields, tokens, start in self.blocks():
            if covered is None and start + tokens <= shortest:
                yield self.codec.attend(query, fields, tokens, scale)
                continue
            mask = self._mask(query)[..., start : start + tokens]
            if covered is not None:
                columns = self.meta["positions"].narrow(2, start, tokens).to(query.device)
                mask = cover(mask, columns.expand(self.rows, -1, -1), covered)
            yield attend_masked(self.codec, query, fields, tokens, scale, mask)

    def page_list(self) -> PageList:
        if self._list is None:
            size, pages = self.page_size, self.pages
            device = self.meta["positions"].device
            lengths = torch.tensor(self.lengths)[:, None].expand(-1, self._sample.shape[1])
            if self.is_even:
                held: Tensor | int = self.length
            else:
                held = on_device(tuple(self.lengths), device)[:, None, None]
            starts = torch.arange(0, pages * size, size, device=device).expand(self.rows, 1, -1)
            self._list = PageList(
                digests=self.digests.narrow(0, pages),
                first=self.meta["positions"][:, :, : pages * size : size],
                tokens=(held - starts).clamp(0, size),
                full=lengths // size,
                partial=(lengths % size > 0).long(),
            )
        return self._list

    def pages_at(self, index: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        if rows is None and self._sample.device == index.device != torch.device("cpu"):
            return {name: taken(tensor, index) for name, tensor in self.fields.items()}
        if "first" not in self._index:
            shape, room = self._sample.shape[:2], self._sample.shape[2]
            owners = torch.arange(math.prod(shape), device=index.device)
            self._index["first"] = (owners * room).view(*shape, 1)
        first = self._index["first"]
        places = index + (first if rows is None else first.index_select(0, rows))
        return {k: select_pages(t.flatten(0, 2), places) for k, t in self.fields.items()}

    def single_pages(
        self, row: Tensor, head: Tensor, page: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Copy m pages [m, ...], each of a stored row, a KV head and an index in `page_list`.

        Return their fields, in the memory of the store, and the columns [m, P] of their tokens.
        """
        heads, room = next(iter(self.fields.values())).shape[1:3]
        places = (row * heads + head) * room + page
        fields = {name: select_pages(t.flatten(0, 2), places) for name, t in self.fields.items()}
        positions = self.meta["positions"].unflatten(2, (-1, self.page_size))
        positions = positions.expand(self.rows, heads, *positions.shape[2:])
        return fields, positions[row, head, page]

    def columns_at(self, index: Tensor, rows: Tensor | None) -> Tensor:
        shape = self.rows, *index.shape[1:2], -1, self.page_size
        positions = self.meta["positions"].unflatten(2, (-1, self.page_size)).expand(shape)
        return taken(positions if rows is None else positions.index_select(0, rows), index)

    def _mask(self, query: Tensor) -> Tensor:
        """Return the additive mask [R, 1, 1, length] that hides places behind the end of a row."""
        mask = self._index.get("mask")
        if mask is None or mask.dtype != query.dtype:
            lengths = on_device(tuple(self.lengths), query.device)
            place = torch.arange(self.length, device=query.device)
            mask = new_mask(query, self.rows, self.length)
            mask.masked_fill_(place >= lengths[:, None], lowest_score(query.dtype))
            self._index["mask"] = mask = mask[:, None, None]
        return mask

    def blocks(self) -> Iterator[Block]:
        """Yield the pages of the stored rows, as many at a time as may be decoded and copied."""
        if self._whole is None:
            for fields, (tokens, start) in self.tier.blocks(self._views()):
                yield Block(fields, tokens, start)
        else:
            yield self._whole

    def _views(self) -> Iterator[tuple[dict[str, Tensor], tuple[int, int]]]:
        step = self._pages_per_block()
        for first in range(0, self.pages, step):
            stop = min(first + step, self.pages)
            fields = {name: tensor[:, :, first:stop] for name, tensor in self.fields.items()}
            start = first * self.page_size
            tokens = min(stop * self.page_size, self.length) - start
            if step >= self.pages and self.tier.in_place:
                self._whole = Block(fields, tokens, start)  # made once, not at every step
            yield fields, (tokens, start)

    def _pages_per_block(self) -> int:
        max_pages = self.tier.max_pages(self.nbytes * self.page_size // self.capacity)
        owners = self.rows * self._sample.shape[1]
        tokens = self.codec.tokens_per_block(owners, self.tier.device)
        return min(max(tokens // self.page_size, 1), max_pages, self.pages)

    def span(self, rows: list[int], *, with_values: bool) -> TokenTable:
        """Return the tokens of batch rows that have equally many, decoded; views if possible."""
        stored = self.stored_of(rows)
        length = self.lengths[stored[0]]
        views = ((self._brought(fields), tokens) for fields, (tokens, _) in self._views())
        parts = [
            {k: flat_tokens(t, tokens) for k, t in decoded(self.codec, fields, with_values).items()}
            for fields, tokens in views
        ]
        # A single part is not copied.
        states = TokenTable(
            {k: torch.cat([part[k] for part in parts], dim=2) for k in parts[0]}
            if len(parts) > 1
            else parts[0]
        )
        if self.codec.is_per_token:
            codes = self._brought(self.fields)
            codes = {name: flat_tokens(t, self.length) for name, t in codes.items()}
            states = states.with_codes(codes)
        tokens = states.with_columns(self.meta.narrow(0, self.length)).narrow(0, length)
        return tokens if stored == list(range(self.rows)) else tokens.of_rows(stored)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.fields.values()
        yield from self.meta.tensors.values()
        yield from self.digests.tensors.values()
        yield from self._index.values()
        yield from () if self._list is None else self._list.tensors()


def _places(
    held: tuple[int, ...], new: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, page and target [n] of `new[r]` pages behind the `held[r]` pages of each row r."""
    ends = on_device(tuple(itertools.accumulate(new)), device)
    place = torch.arange(sum(new), device=device)
    row = torch.bucketize(place, ends, right=True)
    page = place - (ends - on_device(new, device))[row]
    return row, page, on_device(held, device)[row] + page
