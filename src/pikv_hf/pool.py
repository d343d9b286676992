"""Pages of which every row and KV head may have another number.

Shapes: R stored rows, H KV heads, N pages, P tokens a page, D head dim.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pikv_kernels import merge_segments
from torch import Tensor

from .compressors import Compressor
from .memory import is_writable
from .rows import Partial, StoredRows
from .span import Span

# Numbers of queries and head dims that one product over pages may copy.
MOST_COPIED = 2**24


@dataclass(kw_only=True)
class Pool(StoredRows):
    """Pages of one encoding in any order, each with its owner.

    `fields` [capacity, ...] are the encoded pages, `meta` [capacity, 1, P, ...] what is known of
    their tokens, `owner` [capacity] = stored row * H + KV head. `runs` counts the pages in order:
    (pages, valid tokens in each of them).
    """

    compressor: Compressor
    fields: dict[str, Tensor]
    meta: Span
    owner: Tensor
    runs: list[tuple[int, int]]
    stored_rows: int
    heads: int

    @property
    def rows(self) -> int:
        return self.stored_rows

    @property
    def page_count(self) -> int:
        return sum(pages for pages, _ in self.runs)

    @property
    def page_size(self) -> int:
        return self.meta["positions"].shape[2]

    def held(self) -> Tensor:
        held = torch.zeros(self.rows * self.heads, dtype=torch.int64)
        owner = self.owner[: self.page_count].cpu()
        return held.index_add_(0, owner, self._lengths()).view(self.rows, self.heads)

    def _lengths(self) -> Tensor:
        """Valid tokens of each page, [N] on the CPU."""
        pages, tokens = torch.tensor(self.runs, dtype=torch.int64).view(-1, 2).unbind(1)
        return tokens.repeat_interleave(pages)

    def fits(self, meta: Span, batch: int) -> bool:
        """Whether pages like `meta` [n, 1, P, ...] of any of `batch` rows can be written behind."""
        return (
            meta.tensors.keys() == self.meta.tensors.keys()
            and self.is_read_by_all(batch)
            and self.is_in_order()
            and self.page_count + meta["positions"].shape[0] <= self.owner.shape[0]
            and is_writable(self.owner)
        )

    def write(self, fields: dict[str, Tensor], meta: Span, owner: Tensor, tokens: int) -> None:
        """Write pages `fields` [n, ...] behind these, each with `tokens` valid tokens."""
        start, pages = self.page_count, owner.shape[0]
        for name, tensor in fields.items():
            self.fields[name].narrow(0, start, pages).copy_(tensor)
        for name, tensor in meta.tensors.items():
            self.meta[name].narrow(0, start, pages).copy_(tensor)
        self.owner.narrow(0, start, pages).copy_(owner)
        self._add_run(pages, tokens)
        self.changed()

    def _add_run(self, pages: int, tokens: int) -> None:
        if self.runs and self.runs[-1][1] == tokens:
            pages += self.runs.pop()[0]
        self.runs.append((pages, tokens))

    def attend(self, query: Tensor, scale: float) -> Iterator[Partial]:
        asked, start = query.flatten(0, 1), 0
        step = max(1, MOST_COPIED // (asked.shape[1] * asked.shape[2]))
        if self.compressor.block_tokens is not None:
            decoded = self.compressor.block_tokens * len(asked) // self.page_size
            step = min(step, max(1, decoded))
        for pages, tokens in self.runs:
            for first in range(start, start + pages, step):
                block = slice(first, min(first + step, start + pages))
                fields = {name: field[block, None, None] for name, field in self.fields.items()}
                owner = self.owner[block]
                mine = asked.index_select(0, owner)[:, None]
                out, lse = self.compressor.attend(mine, fields, tokens, scale)
                out, lse = merge_segments(out[:, 0], lse[:, 0], owner, len(asked))
                yield out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])
            start += pages

    def decoded(self) -> Span:
        """All its tokens decoded, [N, 1, P, ...], with what is known of them and `order`:

        owner and position as one number [N, 1, P], -1 at places that hold no token.
        """
        used = self.page_count
        fields = {name: field[:used, None, None] for name, field in self.fields.items()}
        keys, values = (states[:, :, 0] for states in self.compressor.decode(fields))
        meta = Span({name: tensor[:used] for name, tensor in self.meta.tensors.items()})
        place = torch.arange(self.page_size, device=self.owner.device)
        valid = place < self._lengths().to(place.device)[:, None, None]
        order = (self.owner[:used, None, None] << 32) + meta["positions"]
        order = order.masked_fill(~valid, -1)
        return meta.joined(Span({"keys": keys, "values": values, "order": order}))

    def keep_rows(self, used: Tensor) -> None:
        new_of_old = torch.full((self.rows,), -1).index_copy_(0, used, torch.arange(len(used)))
        owner = self.owner[: self.page_count]
        row = new_of_old.to(owner.device)[owner // self.heads]
        self._keep_pages(row >= 0, row * self.heads + owner % self.heads)
        self.stored_rows = len(used)

    def crop(self, position: int) -> None:
        columns = self.meta["positions"][: self.page_count, 0]
        place = torch.arange(self.page_size, device=columns.device)
        valid = place < self._lengths().to(place.device)[:, None]
        lengths = ((columns < position) & valid).sum(1)
        self._keep_pages(lengths > 0, self.owner[: self.page_count], lengths)
        self.changed()

    def _keep_pages(self, keep: Tensor, owner: Tensor, lengths: Tensor | None = None) -> None:
        """Free all pages but those of `keep` [N]; `owner` and `lengths` [N] are their new ones."""
        index = keep.nonzero().flatten()
        kept = (self._lengths() if lengths is None else lengths.cpu())[index.cpu()]
        self.fields = {k: v.index_select(0, index.to(v.device)) for k, v in self.fields.items()}
        self.meta = self.meta.rows(index)
        self.owner = owner.index_select(0, index)
        self.runs = [(len(list(same)), size) for size, same in itertools.groupby(kept.tolist())]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.fields.values()
        yield from self.meta.tensors.values()
        yield self.owner
        yield from self._index.values()


def together(pools: list[Pool], rows: list[int]) -> Span:
    """All tokens of batch rows that have equally many in each KV head, from all their pools."""
    parts, heads = [], pools[0].heads
    for pool in pools:
        tokens = pool.decoded()
        flat = Span({name: t.flatten(0, 2)[None, None] for name, t in tokens.tensors.items()})
        for number, row in enumerate(pool.stored_of(rows).tolist()):
            order = flat["order"][0, 0]
            mine = flat.tokens(((order >> 32) // heads == row).nonzero().flatten())
            moved = mine["order"] + ((number - row) * heads << 32)
            parts.append(mine.joined(Span({"order": moved})))
    every = parts[0]
    for part in parts[1:]:
        every = every.then(part)
    every = every.tokens(every["order"][0, 0].argsort()).without("order")
    shape = len(rows), heads, len(every) // (len(rows) * heads)
    return Span({name: t[0, 0].unflatten(0, shape) for name, t in every.tensors.items()})
