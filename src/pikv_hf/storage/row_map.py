"""The base class of page stores, with the mapping from batch rows to stored rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .memory import on_device
from .page_list import PageList
from .tiers import Tier

Partial = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class PageStore(ABC):
    """Pages of stored rows. Batch row `readers[i]` reads stored row `stored[i]`.

    Beams and forks change these lists, never the pages. The encoded pages, `fields`, are in `tier`;
    all other tensors stay on the device where they were made.
    """

    fields: dict[str, Tensor]
    tier: Tier
    readers: list[int]
    stored: list[int]
    # True if another cache shares the tensors: nothing may be written to them.
    is_forked: bool = field(default=False, kw_only=True)
    _index: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of stored rows."""

    @property
    @abstractmethod
    def page_count(self) -> int:
        """Number of pages of all stored rows and KV heads."""

    @property
    @abstractmethod
    def room(self) -> float:
        """Share of the memory that is free for more pages."""

    @abstractmethod
    def held(self) -> Tensor:
        """Count the tokens of each stored row and KV head, [rows, H] on the CPU."""

    @abstractmethod
    def attend(
        self, query: Tensor, scale: float, covered: Tensor | None = None
    ) -> Iterator[Partial]:
        """Yield outputs [rows, H, Q, Dv] and log-sum-exps [rows, H, Q] of `query` [rows, H, Q, Dk].

        `covered` [rows, Q, n] bool is True at columns that a query may not see; None = it sees all.
        """

    @abstractmethod
    def page_list(self) -> PageList:
        """Return the pages of each KV head. On a device, it may wait after pages have changed."""

    @abstractmethod
    def pages_at(self, index: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """Copy the encoded pages [n, H, K, ...] of `index` [n, H, K] in `page_list`, in their memory.

        They are of the stored `rows` [n]; None = of all stored rows in order.
        """

    @abstractmethod
    def columns_at(self, index: Tensor, rows: Tensor | None) -> Tensor:
        """Return the columns [n, H, K, P] of the tokens of the pages that `pages_at` copies."""

    @abstractmethod
    def crop(self, position: int) -> None:
        """Drop every token from column `position` on. Only for pages in order of position."""

    @abstractmethod
    def keep_rows(self, used: Tensor) -> None:
        """Free the pages of all stored rows except the `used` rows, which get new numbers."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors held."""

    @property
    @abstractmethod
    def home(self) -> torch.device:
        """The device of the layer, where all tensors but the encoded pages are."""

    def set_fields(self, fields: dict[str, Tensor]) -> None:
        """Replace the encoded pages by equal ones in other memory."""
        self.fields = fields
        self.changed()

    def _brought(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy `fields` to the device of the layer, if they are not there."""
        return {name: tensor.to(self.home) for name, tensor in fields.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded pages, including the room for more."""
        return sum(tensor.nbytes for tensor in self.fields.values())

    @property
    @abstractmethod
    def page_bytes(self) -> int:
        """Bytes of one encoded page of a KV head."""

    def __getstate__(self) -> dict[str, Any]:
        self.changed()  # derived tensors are made again
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and move loaded or copied pages from plain memory into the tier."""
        vars(self).update(state)
        self.fields = {name: self.tier.hold(tensor) for name, tensor in self.fields.items()}

    def mark_forked(self) -> None:
        """Mark the tensors as shared with another cache."""
        self.is_forked = True

    def is_read_by_all(self, batch: int) -> bool:
        return self.readers == list(range(batch))

    def spread(self, out: Tensor, lse: Tensor, batch: int) -> Partial:
        """Extend results [readers, ...] to all batch rows; other rows attend to no key."""
        if self.is_read_by_all(batch):
            return out, lse
        readers = self.index("readers", out.device)
        all_out = out.new_zeros(batch, *out.shape[1:])
        all_lse = lse.new_full((batch, *lse.shape[1:]), -torch.inf)
        return all_out.index_copy_(0, readers, out), all_lse.index_copy_(0, readers, lse)

    def is_in_order(self) -> bool:
        """Return True if reader i reads stored row i, and every stored row is read."""
        return self.stored == list(range(self.rows))

    def stored_of(self, rows: list[int]) -> list[int]:
        """Return the stored rows that the given batch rows read."""
        return [self.stored[self.readers.index(row)] for row in rows]

    def changed(self) -> None:
        """Forget all data derived from the rows or the tokens."""
        self._index = {}

    def index(self, name: str, device: torch.device) -> Tensor:
        """Return the index tensor `name`, made once: `readers`, `stored`, `queried` or `places`.

        `queried` [R * m] lists the batch rows that read stored row 0, then 1, ..., padded to m each:
        so each stored row is read once. `places` [len(readers)] are the places of the readers in
        `queried`.
        """
        key = (name, device)
        if key not in self._index:
            members = getattr(self, name) if hasattr(self, name) else self._sharing()[name]
            self._index[key] = on_device(tuple(members), device)
        return self._index[key]

    def _sharing(self) -> dict[str, list[int]]:
        readers_of: list[list[int]] = [[] for _ in range(self.rows)]
        slots = []
        for reader, row in zip(self.readers, self.stored, strict=True):
            slots.append(len(readers_of[row]))
            readers_of[row].append(reader)
        width = max(map(len, readers_of))
        filled = [readers + self.readers[:1] * (width - len(readers)) for readers in readers_of]
        return {
            "queried": [reader for readers in filled for reader in readers],
            "places": [row * width + slot for row, slot in zip(self.stored, slots, strict=True)],
        }

    def map_rows(self, source: list[int]) -> None:
        """Let new batch row i read what old batch row `source[i]` read."""
        old = dict(zip(self.readers, self.stored, strict=True))
        self.readers = [row for row, parent in enumerate(source) if parent in old]
        self.stored = [old[parent] for parent in source if parent in old]
        self.changed()

    def drop_readers(self, gone: set[int]) -> None:
        """Remove the batch rows `gone` from the readers."""
        pairs = zip(self.readers, self.stored, strict=True)
        kept = [(reader, row) for reader, row in pairs if reader not in gone]
        self.readers, self.stored = [r for r, _ in kept], [s for _, s in kept]
        self.changed()

    def forget_unread_rows(self) -> None:
        """Free the pages of stored rows that no batch row reads any more."""
        used = sorted(set(self.stored))
        if len(used) == self.rows:
            return
        self.keep_rows(torch.tensor(used))
        self.stored = [used.index(row) for row in self.stored]
        self.changed()
