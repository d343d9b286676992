"""Pages of equally many tokens in every row and KV head.

Shapes: R stored rows, H KV heads, S pages, P tokens a page, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .codec import PageCodec, decoded, flat_tokens
from .memory import is_writable
from .row_map import PageStore, Partial
from .token_table import TokenTable

# Encoded pages [R, H, s, ...] and the number of their valid tokens.
Block = tuple[dict[str, Tensor], int]


@dataclass(kw_only=True)
class UniformPages(PageStore):
    """Pages of R stored rows that were sealed together, or one after another.

    `fields` [R, H, S, ...] are the encoded pages; `meta` is other data of their tokens
    (`positions`, and labels if recorded), [R or 1, H or 1, S * P, ...]. The first `length` tokens
    of each row and head are valid; the places behind them are never read.
    """

    codec: PageCodec
    meta: TokenTable
    length: int
    page_size: int
    _whole: Block | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return next(iter(self.fields.values())).shape[0]

    @property
    def capacity(self) -> int:
        return next(iter(self.fields.values())).shape[2] * self.page_size

    @property
    def pages(self) -> int:
        return -(-self.length // self.page_size)

    @property
    def page_count(self) -> int:
        return self.pages * self.rows * next(iter(self.fields.values())).shape[1]

    @property
    def room(self) -> float:
        return 1 - self.pages * self.page_size / self.capacity

    def held(self) -> Tensor:
        return torch.full(next(iter(self.fields.values())).shape[:2], self.length, device="cpu")

    def free_pages(self, meta: TokenTable, batch: int) -> int:
        """Return how many pages of tokens like `meta`, of all `batch` rows, can be appended."""
        # Data shared by all rows or heads can be written to data of each one, not vice versa.
        alike = meta.tensors.keys() == self.meta.tensors.keys() and all(
            new in (1, held)
            for name in meta.tensors
            for new, held in zip(meta[name].shape[:2], self.meta[name].shape[:2], strict=True)
        )
        is_free = (
            alike
            and not self.is_forked
            and self.is_read_by_all(batch)
            and self.is_in_order()
            and self.length % self.page_size == 0
            and is_writable(next(iter(self.fields.values())))
        )
        return (self.capacity - self.length) // self.page_size if is_free else 0

    def write(self, fields: dict[str, Tensor], meta: TokenTable) -> None:
        """Append the pages `fields` [R, H, s, ...] of the tokens `meta`."""
        for name, tensor in fields.items():
            self.fields[name].narrow(2, self.pages, tensor.shape[2]).copy_(tensor)
        self.meta.write(self.length, meta)
        self.length += len(meta)
        self.changed()

    def changed(self) -> None:
        super().changed()
        self._whole = None

    def keep_rows(self, used: Tensor) -> None:
        self.fields = {k: self.tier.select(v, used) for k, v in self.fields.items()}
        self.meta = self.meta.select_rows(used)

    def crop(self, position: int) -> None:
        columns = self.meta["positions"][0, 0, : self.length]
        self.length = int((columns < position).sum())
        self.changed()

    def attend(self, query: Tensor, scale: float) -> Iterator[Partial]:
        for fields, tokens in self.blocks():
            yield self.codec.attend(query, fields, tokens, scale)

    def blocks(self) -> Iterator[Block]:
        """Yield the pages of the stored rows, as many at a time as the compressor decodes."""
        if self._whole is None:
            yield from self.tier.blocks(self._views())
        else:
            yield self._whole

    def _views(self) -> Iterator[Block]:
        step = self._pages_per_block()
        for start in range(0, self.pages, step):
            stop = min(start + step, self.pages)
            fields = {name: tensor[:, :, start:stop] for name, tensor in self.fields.items()}
            block = fields, min(stop * self.page_size, self.length) - start * self.page_size
            if step >= self.pages and self.tier.in_place:
                self._whole = block  # made once, not at every step
            yield block

    def selected_blocks(self, pages: Tensor) -> Iterator[Block]:
        """Yield copies of the full pages `pages` [len(readers), H, K] of each reader, in blocks."""
        step = self._pages_per_block()
        rows = TokenTable(self.fields).select_rows(self.index("stored", pages.device))
        for start in range(0, pages.shape[2], step):
            chosen = pages[:, :, start : start + step]
            yield self.tier.bring(rows.gather(chosen).tensors), chosen.shape[2] * self.page_size

    def _pages_per_block(self) -> int:
        max_pages = self.tier.most_pages(self.nbytes * self.page_size // self.capacity)
        if self.codec.block_tokens is None:
            return min(self.pages, max_pages)
        return min(max(1, self.codec.block_tokens // self.page_size), max_pages)

    def span(self, rows: list[int], *, with_values: bool) -> TokenTable:
        """Decode all tokens of the given batch rows, as views if nothing has to be made."""
        views = ((self.tier.bring(fields), tokens) for fields, tokens in self._views())
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
            codes = self.tier.bring(self.fields)
            codes = {name: flat_tokens(t, self.length) for name, t in codes.items()}
            states = states.with_codes(codes)
        tokens = states.with_columns(self.meta.narrow(0, self.length))
        stored = self.stored_of(rows)
        return tokens if stored.tolist() == list(range(self.rows)) else tokens.select_rows(stored)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.fields.values()
        yield from self.meta.tensors.values()
        yield from self._index.values()
