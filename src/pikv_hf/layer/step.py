"""A step of a cache: a forward pass, or sealing by itself."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..storage.memory import trim_heap
from ..storage.prompt_buffer import PromptBuffer

# Bytes of keys and values sealed before the heap is trimmed: large, as trimming takes time.
TRIMMED = 2**26


@dataclass
class Change:
    """A change of a cache of `seen` tokens: a forward pass of `length` tokens, or sealing (0).

    While it is half done, layers hold different tokens.
    """

    seen: int
    length: int = 0
    has_written: bool = False
    has_sealed: bool = False

    @property
    def is_half_done(self) -> bool:
        return self.has_written or self.has_sealed


class Step:
    """The step of a cache that runs or has failed, and what its layers compute for each other.

    `change` is None between steps. `buffer` is lent to one layer after the other.
    """

    def __init__(self) -> None:
        self.change: Change | None = None
        self.buffer = PromptBuffer()
        self._memo: dict[str, tuple[Any, Any]] = {}
        self._notes: dict[tuple[int, ...], dict[Any, Any]] = {}
        # True if the user masks each query, and may hide a token from some queries alone.
        self._has_own_mask = False
        # Keys and values on the CPU that were sealed since the heap was trimmed.
        self._sealed_bytes = 0

    def begin(self, change: Change, mask: Tensor | None = None) -> None:
        """Begin a forward pass; `mask` is the full-attention mask that the model was given."""
        self._has_own_mask = mask is not None and mask.dim() == 4
        self.change = change

    def end(self) -> None:
        """End a forward pass that has succeeded."""
        self.change = None

    @contextlib.contextmanager
    def sealing(self, seen: int) -> Generator[None, None, None]:
        """Mark a block that seals a cache of `seen` tokens; `change` remains if it fails."""
        self.change = Change(seen)
        yield
        self.change = None

    def note_written(self) -> None:
        """Note that a layer is being written to."""
        if self.change is not None:
            self.change.has_written = True

    def note_sealed(self) -> None:
        """Note that pages or token statistics are changing, which cannot be undone."""
        if self.change is not None:
            self.change.has_sealed = True

    def add_sealed_bytes(self, nbytes: int) -> None:
        """Count keys and values on the CPU that have left the tail."""
        self._sealed_bytes += nbytes

    def release(self) -> None:
        """Free the memory of a single forward pass."""
        self.forget()
        self.buffer = PromptBuffer()  # the old buffer would count as held
        if self._sealed_bytes >= TRIMMED:
            self._sealed_bytes = 0
            trim_heap()

    def reset(self) -> None:
        """Forget everything, including a change that has failed."""
        self.release()
        self.change = None

    def forget(self) -> None:
        """Forget what layers have computed or noted, as after a failed pass or a `crop`."""
        self._memo.clear()
        self._notes.clear()

    def remember(self, name: str, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """Return `compute()`, called once per `key` (parts compared by identity) for all layers."""
        held = self._memo.get(name)
        if held is not None and all(
            a is b or (isinstance(a, int | tuple | torch.device) and a == b)
            for a, b in zip(held[0], key, strict=True)
        ):
            return held[1]
        value = compute()
        self._memo[name] = (key, value)
        return value

    def notes(self, rows: list[int]) -> dict[Any, Any]:
        """Return the notes on these batch rows, which earlier layers write for later ones."""
        return self._notes.setdefault(tuple(rows), {})

    def over_queries(self, mask: Tensor | None) -> Tensor | None:
        """Return `mask`; of a user's own [B, H, q, columns], the columns that any query sees.

        In masks that models make, the newest query sees all but padding.
        """
        if mask is None or not self._has_own_mask or mask.dim() == 2:
            return mask
        return self.remember("own", (mask,), lambda: mask.amax((1, 2), keepdim=True))
