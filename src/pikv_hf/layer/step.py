"""One step of a cache: a forward pass, or sealing by itself."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..storage.memory import trim_heap
from ..storage.prompt_buffer import PromptBuffer

# Bytes of keys and values that are sealed until the heap is trimmed: rarely enough to cost little.
TRIMMED = 2**26


@dataclass
class Change:
    """What is being done to a cache of `seen` tokens: a forward pass of `length` more, or sealing (0).

    While it is half done, some layers hold what others do not.
    """

    seen: int
    length: int = 0
    has_written: bool = False
    has_sealed: bool = False

    @property
    def is_half_done(self) -> bool:
        return self.has_written or self.has_sealed


class Step:
    """The step that runs on a cache, or that has failed; its layers share what they compute in it.

    `change` is None between steps. `buffer` is lent to one layer after the other.
    """

    def __init__(self) -> None:
        self.change: Change | None = None
        self.buffer = PromptBuffer()
        self._memo: dict[str, tuple[Any, Any]] = {}
        self._notes: dict[tuple[int, ...], dict[Any, Any]] = {}
        # The user masks each query, and may hide a token from some queries and not from others.
        self._has_own_mask = False
        # Keys and values on the CPU that were sealed since the heap was trimmed.
        self._sealed_bytes = 0

    def begin(self, change: Change, mask: Tensor | None = None) -> None:
        """A forward pass begins; `mask` is the full-attention mask that the model was given."""
        self.forget()
        self._has_own_mask = mask is not None and mask.dim() == 4
        self.change = change

    def end(self) -> None:
        """The forward pass has succeeded."""
        self.change = None

    @contextlib.contextmanager
    def sealing(self, seen: int) -> Generator[None, None, None]:
        """Within the block a cache of `seen` tokens seals; the change stays if the block fails."""
        self.change = Change(seen)
        yield
        self.change = None

    def note_written(self) -> None:
        """A layer is being written to."""
        if self.change is not None:
            self.change.has_written = True

    def note_sealed(self) -> None:
        """Pages, or token statistics, are changing: this cannot be taken back."""
        if self.change is not None:
            self.change.has_sealed = True

    def add_sealed_bytes(self, nbytes: int) -> None:
        """Count keys and values on the CPU that have left the tail."""
        self._sealed_bytes += nbytes

    def release(self) -> None:
        """Free what served one forward pass only."""
        self.forget()
        self.buffer = PromptBuffer()  # which would count as held
        if self._sealed_bytes >= TRIMMED:
            self._sealed_bytes = 0
            trim_heap()

    def reset(self) -> None:
        """Forget everything, a change that has failed too."""
        self.release()
        self.change = None

    def forget(self) -> None:
        """Forget what layers have computed or noted, as after a failed pass or a `crop`."""
        self._memo.clear()
        self._notes.clear()

    def remember(self, name: str, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """`compute()`, once per `key` (compared by identity of its parts) for all layers."""
        held = self._memo.get(name)
        if held is not None and all(
            a is b or (isinstance(a, int | torch.device) and a == b)
            for a, b in zip(held[0], key, strict=True)
        ):
            return held[1]
        value = compute()
        self._memo[name] = (key, value)
        return value

    def notes(self, rows: list[int]) -> dict[Any, Any]:
        """What earlier layers left for later ones about these batch rows; write to it."""
        return self._notes.setdefault(tuple(rows), {})

    def over_queries(self, mask: Tensor | None) -> Tensor | None:
        """`mask` as the model made it, or what any query sees, of a user's own [B, H, q, columns].

        The newest query sees all but padding in the masks that models make.
        """
        if mask is None or not self._has_own_mask or mask.dim() == 2:
            return mask
        return self.remember("own", (mask,), lambda: mask.amax((1, 2), keepdim=True))
