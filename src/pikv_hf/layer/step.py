"""A step of a cache: a forward pass, or sealing outside of one."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..storage.memory import trim_heap
from ..storage.prompt_buffer import PromptBuffer
from ..storage.token_table import TokenTable

# Bytes of keys and values sealed before the heap is trimmed: large, as trimming takes time.
TRIMMED = 2**26


@dataclass
class Change:
    """A change of a cache of `seen` tokens: a forward pass of `length` tokens; 0 = sealing only.

    While a change is half done, layers may hold different tokens.
    """

    seen: int
    length: int = 0
    has_written: bool = False
    has_sealed: bool = False

    @property
    def is_half_done(self) -> bool:
        return self.has_written or self.has_sealed


class Step:
    """The step of a cache that runs or has failed, and results that its layers share.

    `change` is None unless a step runs or has failed. `buffer` is lent to one layer at a time.
    """

    def __init__(self) -> None:
        self.change: Change | None = None
        self.buffer = PromptBuffer()
        self._memo: dict[str, tuple[Any, Any]] = {}
        self._notes: dict[tuple[int, ...], dict[Any, Any]] = {}
        # Labels of the new tokens by the gates of paged layers, by the layer's number.
        self._labels: dict[int, TokenTable] = {}
        # What has been done once in this pass.
        self._done: set[str] = set()
        # Labels of the new tokens by the early gates of paged layers, by the layer's number.
        self._foretold: dict[int, TokenTable] = {}
        # True if the user's mask is per query: it may hide a token from some queries only.
        self._has_own_mask = False
        # Bytes of keys and values on the CPU that were sealed since the heap was trimmed.
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
        """Count the bytes of keys and values on the CPU that have left a tail."""
        self._sealed_bytes += nbytes

    def release(self) -> None:
        """Free the memory that served the forward pass, and trim the heap if much was sealed."""
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
        """Forget the shared results and notes, for instance after a failed pass or a `crop`."""
        self._memo.clear()
        self._notes.clear()
        self._labels.clear()
        self._done.clear()
        self._foretold.clear()

    def remember(self, name: str, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """Return `compute()`, or its last result under `name` if `key` has not changed.

        Parts of a key are compared by identity, but ints, tuples and devices by value.
        """
        held = self._memo.get(name)
        if held is not None and all(
            a is b or (isinstance(a, int | tuple | torch.device) and a == b)
            for a, b in zip(held[0], key, strict=True)
        ):
            return held[1]
        value = compute()
        self._memo[name] = (key, value)
        return value

    def is_first(self, name: str) -> bool:
        """Return True if this is the first call with `name` in this forward pass."""
        is_first = name not in self._done
        self._done.add(name)
        return is_first

    def notes(self, rows: list[int]) -> dict[Any, Any]:
        """Return the notes that earlier layers have left on these batch rows for later layers."""
        return self._notes.setdefault(tuple(rows), {})

    def note_labels(self, paged_index: int, labels: TokenTable) -> None:
        """Note `labels` [B, 1, q, k] of the new tokens by the gate of a paged layer."""
        self._labels[paged_index] = labels

    def labels_before(self, paged_index: int, device: torch.device) -> TokenTable | None:
        """Return labels [B, 1, q, k] of the new tokens by the nearest gate before a paged layer.

        None = no earlier layer has a gate.
        """
        earlier = max((n for n in self._labels if n < paged_index), default=None)
        return None if earlier is None else self._labels[earlier].to(device)

    def foretell(self, paged_index: int, labels: TokenTable) -> None:
        """Note `labels` [B, 1, q, k] that the gate of a paged layer chose before its attention."""
        self._foretold[paged_index] = labels

    def foretold(self, paged_index: int, layer_idx: int) -> TokenTable:
        """Return the labels noted by `foretell` for a paged layer.

        Raises:
            RuntimeError: there are none.
        """
        if paged_index not in self._foretold:
            raise RuntimeError(
                f"layer {layer_idx}: its decoder layer was not called, so that its gate could not be "
                "applied before attention: use `experts_from='previous_layer'`."
            )
        return self._foretold[paged_index]

    def over_queries(self, mask: Tensor | None) -> Tensor | None:
        """Return `mask`, but a user's [B, H, q, columns] as its union [B, 1, 1, columns].

        Other masks need no change: their newest query sees all columns but padding.
        """
        if mask is None or not self._has_own_mask or mask.dim() == 2:
            return mask
        return self.remember("own", (mask,), lambda: mask.amax((1, 2), keepdim=True))
