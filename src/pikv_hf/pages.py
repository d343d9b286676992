"""The page table of one layer: storage only, it knows no policy.

Shapes: B rows, H KV heads, T tokens, S pages, P tokens a page, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .compressors import Compressor, flat_tokens
from .span import Span

# A slab that grows page by page is made for 1/16 of the pages held: few slabs, little unused room.
GROWTH = 16
MIN_GROWTH, MAX_GROWTH = 4, 32

# Encoded pages [R, H, s, ...] and how many of their tokens are valid.
Block = tuple[dict[str, Tensor], int]


def own(tensor: Tensor) -> Tensor:
    """`tensor`, dense and alone in its storage, so that nothing larger is kept alive by it."""
    tensor = tensor.contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def is_writable(tensor: Tensor) -> bool:
    """Tensors made under `torch.inference_mode` cannot be written outside of it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


@dataclass
class Slab:
    """Pages of R stored rows that were sealed together, or one after the other.

    `fields` [R, H, S, ...] are the encoded pages; `meta` is what is known of their tokens
    (`positions`, and labels if recorded), [R or 1, H or 1, S * P, ...]. The first `length` tokens
    of each row and head are valid; what lies behind them is never read. Batch row `readers[i]`
    reads stored row `stored[i]`: beams and forks change these lists, never the pages.
    """

    fields: dict[str, Tensor]
    meta: Span
    length: int
    page_size: int
    readers: list[int]
    stored: list[int]
    _index: dict[str, Tensor] = field(default_factory=dict, repr=False)
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

    def is_read_by_all(self, batch: int) -> bool:
        return self.readers == list(range(batch))

    def is_in_order(self) -> bool:
        """Whether the readers read the stored rows one to one, so that nothing is gathered."""
        return self.stored == list(range(self.rows))

    def is_open(self, batch: int) -> bool:
        """Whether pages of all `batch` rows can be written behind these."""
        return (
            self.is_read_by_all(batch)
            and self.is_in_order()
            and self.length % self.page_size == 0
            and self.length < self.capacity
            and is_writable(next(iter(self.fields.values())))
        )

    def changed(self) -> None:
        """Forget what was derived from the rows or the length."""
        self._index, self._whole = {}, None

    def index(self, name: str, device: torch.device) -> Tensor:
        """An index tensor, made once: `readers`; `stored`; or, to read each stored row once,

        `asked` [R * m]: the batch rows that read stored row 0, then 1, ..., filled up to m each,
        and `places` [len(readers)]: where in `asked` each reader stands.
        """
        if name not in self._index:
            members = getattr(self, name) if hasattr(self, name) else self._sharing()[name]
            self._index[name] = torch.tensor(members, dtype=torch.int64, device=device)
        return self._index[name]

    def _sharing(self) -> dict[str, list[int]]:
        readers_of: list[list[int]] = [[] for _ in range(self.rows)]
        slots = []
        for reader, row in zip(self.readers, self.stored, strict=True):
            slots.append(len(readers_of[row]))
            readers_of[row].append(reader)
        most = max(map(len, readers_of))
        filled = [readers + self.readers[:1] * (most - len(readers)) for readers in readers_of]
        return {
            "asked": [reader for readers in filled for reader in readers],
            "places": [row * most + slot for row, slot in zip(self.stored, slots, strict=True)],
        }

    def map_rows(self, source: list[int]) -> None:
        """New batch row i reads what old batch row `source[i]` read."""
        old = dict(zip(self.readers, self.stored, strict=True))
        self.readers = [row for row, parent in enumerate(source) if parent in old]
        self.stored = [old[parent] for parent in source if parent in old]
        self.changed()

    def forget_unread_rows(self) -> None:
        """Free the pages of stored rows that no batch row reads any more."""
        used = sorted(set(self.stored))
        if len(used) == self.rows:
            return
        keep = torch.tensor(used)
        self.fields = {k: v.index_select(0, keep.to(v.device)) for k, v in self.fields.items()}
        self.meta = self.meta.rows(keep)
        self.stored = [used.index(row) for row in self.stored]
        self.changed()

    def blocks(self, compressor: Compressor) -> Iterator[Block]:
        """The pages of the stored rows, as many at a time as the compressor decodes: views."""
        if self._whole is not None:
            yield self._whole
            return
        step = self._pages_per_block(compressor)
        for start in range(0, self.pages, step):
            stop = min(start + step, self.pages)
            fields = {name: tensor[:, :, start:stop] for name, tensor in self.fields.items()}
            block = fields, min(stop * self.page_size, self.length) - start * self.page_size
            if step >= self.pages:
                self._whole = block  # made once, not at every step
            yield block

    def selected_blocks(self, compressor: Compressor, pages: Tensor) -> Iterator[Block]:
        """Copies of the pages `pages` [len(readers), H, K], all full ones, for each reader."""
        step = self._pages_per_block(compressor)
        rows = Span(self.fields).rows(self.index("stored", pages.device))
        for start in range(0, pages.shape[2], step):
            chosen = pages[:, :, start : start + step]
            yield rows.gather(chosen).tensors, chosen.shape[2] * self.page_size

    def _pages_per_block(self, compressor: Compressor) -> int:
        if compressor.block_tokens is None:
            return self.pages
        return max(1, compressor.block_tokens // self.page_size)

    def span(self, compressor: Compressor, rows: list[int]) -> Span:
        """All tokens of the given batch rows, decoded."""
        stored = torch.tensor([self.stored[self.readers.index(row)] for row in rows])
        decoded = [
            (compressor.decode(fields), tokens) for fields, tokens in self.blocks(compressor)
        ]
        keys, values = (
            torch.cat([flat_tokens(states[i], tokens) for states, tokens in decoded], dim=2)
            for i in range(2)
        )
        states = Span({"keys": keys, "values": values})
        return states.joined(self.meta.narrow(0, self.length)).rows(stored)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.fields.values()
        yield from self.meta.tensors.values()
        yield from self._index.values()


class PageTable:
    """The pages of one layer, in slabs. Sealed pages are immutable and encoded once."""

    def __init__(self, compressor: Compressor, page_size: int) -> None:
        self.compressor = compressor
        self.page_size = page_size
        self.slabs: list[Slab] = []

    def append(self, span: Span, rows: list[int], batch: int) -> None:
        """Seal `span`, tokens of the batch rows `rows`, with `keys`, `values` and what is known."""
        fields = self._encode(span)
        pages = next(iter(fields.values())).shape[2]
        meta = span.without("keys", "values")
        meta = Span({"positions": meta["positions"].to(torch.int32)}).joined(
            meta.without("positions")
        )
        slab = self._open_slab(meta, rows, batch)
        if slab is not None:
            for name, tensor in fields.items():
                slab.fields[name].narrow(2, slab.pages, pages).copy_(tensor)
            slab.meta.write(slab.length, meta)
            slab.length += len(span)
            slab.changed()
            return
        grows = len(rows) == batch and len(span) % self.page_size == 0
        room = max(pages, self._growth()) if grows else pages
        if room > pages:
            fields = dict(Span(fields).with_room(room).tensors)
        self.slabs.append(
            Slab(
                fields={name: own(tensor) for name, tensor in fields.items()},
                meta=meta.with_room(room * self.page_size),
                length=len(span),
                page_size=self.page_size,
                readers=list(rows),
                stored=list(range(len(rows))),
            )
        )

    def _encode(self, span: Span) -> dict[str, Tensor]:
        """The encoded pages [R, H, S, ...]; the last page is filled up with zeros."""
        rows, heads, length = span["keys"].shape[:3]
        pages, missing = -(-length // self.page_size), -length % self.page_size

        def paged(tensor: Tensor) -> Tensor:
            if missing:
                tensor = F.pad(tensor, (0, 0, 0, missing))
            return tensor.reshape(rows, heads, pages, self.page_size, tensor.shape[3])

        return self.compressor.encode(paged(span["keys"]), paged(span["values"]))

    def _open_slab(self, meta: Span, rows: list[int], batch: int) -> Slab | None:
        """The last slab, if tokens like `meta` of all batch rows can be written behind its own."""
        if not self.slabs or len(rows) < batch:
            return None
        slab = self.slabs[-1]
        alike = meta.tensors.keys() == slab.meta.tensors.keys() and all(
            slab.meta[name].shape[:2] == meta[name].shape[:2] for name in meta.tensors
        )
        fits = slab.length + len(meta) <= slab.capacity
        return slab if alike and fits and slab.is_open(batch) else None

    def _growth(self) -> int:
        held = sum(slab.pages for slab in self.slabs)
        return min(max(held // GROWTH, MIN_GROWTH), MAX_GROWTH)

    def signature(self, row: int) -> tuple[int, ...]:
        """The slabs that a batch row reads: rows of equal signature hold equally many tokens."""
        return tuple(i for i, slab in enumerate(self.slabs) if row in slab.readers)

    def take(self, rows: list[int]) -> Span | None:
        """Remove and return, decoded, the tokens of batch rows of one signature."""
        spans = [s.span(self.compressor, rows) for s in self.slabs if rows[0] in s.readers]
        gone = set(rows)
        for slab in self.slabs:
            kept = [(r, s) for r, s in zip(slab.readers, slab.stored, strict=True) if r not in gone]
            slab.readers, slab.stored = [r for r, _ in kept], [s for _, s in kept]
            slab.changed()
        self.slabs = [slab for slab in self.slabs if slab.readers]
        for slab in self.slabs:
            slab.forget_unread_rows()
        taken = None
        for span in spans:
            taken = span if taken is None else taken.then(span)
        return taken

    def crop(self, position: int) -> None:
        """Drop every token from column `position` on. Only for pages in order of position."""
        for slab in self.slabs:
            columns = slab.meta["positions"][0, 0, : slab.length]
            slab.length = int((columns < position).sum())
            slab.changed()
        self.slabs = [slab for slab in self.slabs if slab.length]

    def map_rows(self, source: list[int], *, free: bool) -> None:
        """New batch row i reads the pages of old batch row `source[i]`; pages are not copied.

        With `free`, the pages that no row reads any more are given back.
        """
        for slab in self.slabs:
            slab.map_rows(source)
        self.slabs = [slab for slab in self.slabs if slab.readers]
        if free:
            for slab in self.slabs:
                slab.forget_unread_rows()

    def tensors(self) -> Iterator[Tensor]:
        for slab in self.slabs:
            yield from slab.tensors()
        yield from self.compressor.tensors()
