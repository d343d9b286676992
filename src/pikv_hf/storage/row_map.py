"""Which batch row reads which stored row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tiers import Tier

Partial = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class PageStore(ABC):
    """Pages of stored rows. Batch row `readers[i]` reads stored row `stored[i]`.

    Beams and forks change these lists, never the pages. The encoded pages, `fields`, live in `tier`;
    what is known of their tokens, and by whom they are read, stays where it was made.
    """

    fields: dict[str, Tensor]
    tier: Tier
    readers: list[int]
    stored: list[int]
    # Another cache has the same tensors: nothing is written behind them.
    is_forked: bool = field(default=False, kw_only=True)
    _index: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    @abstractmethod
    def rows(self) -> int:
        """Stored rows."""

    @property
    @abstractmethod
    def page_count(self) -> int:
        """Pages of all stored rows and KV heads."""

    @property
    @abstractmethod
    def room(self) -> float:
        """The share of its memory that is for more pages."""

    @abstractmethod
    def held(self) -> Tensor:
        """Tokens of each stored row and KV head, [rows, H] on the CPU."""

    @abstractmethod
    def attend(self, query: Tensor, scale: float) -> Iterator[Partial]:
        """Partial results [rows, H, Q, Dv] and [rows, H, Q] of `query` [rows, H, Q, Dk]."""

    @abstractmethod
    def crop(self, position: int) -> None:
        """Drop every token from column `position` on. Only for pages in order of position."""

    @abstractmethod
    def keep_rows(self, used: Tensor) -> None:
        """Free the pages of all stored rows but the `used` ones, which are numbered anew."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded pages, with the room for more."""
        return sum(tensor.nbytes for tensor in self.fields.values())

    def __getstate__(self) -> dict[str, Any]:
        self.changed()  # what is derived is made again
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was loaded or copied lies in plain memory: back where it belongs."""
        vars(self).update(state)
        self.fields = {name: self.tier.hold(tensor) for name, tensor in self.fields.items()}

    def mark_forked(self) -> None:
        """Another cache has the same tensors from now on."""
        self.is_forked = True

    def is_read_by_all(self, batch: int) -> bool:
        return self.readers == list(range(batch))

    def is_in_order(self) -> bool:
        """Whether the readers read the stored rows one to one, so that nothing is gathered."""
        return self.stored == list(range(self.rows))

    def stored_of(self, rows: list[int]) -> Tensor:
        """The stored rows that the given batch rows read."""
        return torch.tensor([self.stored[self.readers.index(row)] for row in rows])

    def changed(self) -> None:
        """Forget what was derived from the rows or the length."""
        self._index = {}

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

    def drop_readers(self, gone: set[int]) -> None:
        """The batch rows `gone` read these pages no more."""
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
