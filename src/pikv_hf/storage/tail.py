"""The newest tokens of one layer, which are not sealed yet."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .memory import is_writable
from .prompt_buffer import PromptBuffer
from .token_table import TokenTable

# Bytes of room in a small buffer.
FEW = 2**13


def roomy(tokens: int, seen: int, token_bytes: int) -> int:
    """Return the capacity in tokens of a buffer for `tokens` tokens and more to come.

    The room is for a quarter of the `seen` tokens, at least `FEW` bytes. Growth by a factor keeps
    the cost of copying per token constant.
    """
    return tokens + max(seen // 4, FEW // max(token_bytes, 1))


class Tail:
    """The newest tokens in the model's dtype, in a buffer that is written in place."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Start with the model's own tensors, without a copy."""
        self.keys, self.values = keys, values
        self.length = keys.shape[2]
        self.labels: TokenTable | None = None
        # The tail's own buffers while its tokens are in borrowed buffers, else None.
        self._own: tuple[Tensor, Tensor] | None = None

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all rows and heads."""
        batch, heads, _, dim = self.keys.shape
        return batch * heads * (dim + self.values.shape[3]) * self.keys.element_size()

    @property
    def is_borrowed(self) -> bool:
        """True if the tokens are in buffers lent by a `PromptBuffer`."""
        return self._own is not None

    def has_room(self, count: int) -> bool:
        """Return True if `count` more tokens can be written to the buffer."""
        return self.length + count <= self.keys.shape[2] and is_writable(self.keys)

    def make_room(self, count: int, capacity: int, scratch: PromptBuffer | None) -> None:
        """Move to a buffer for `capacity` tokens, or for more if `count` more tokens need it.

        In the second case the buffer is borrowed from `scratch`, if it is given, until `drop`.
        """
        end = self.length + count
        if self.keys.shape[2] < end and end > capacity and scratch is not None and not self._own:
            own = self.keys, self.values
            self._move(0, scratch.lend(*own, end))
            self._own = own
        else:
            self._move(0, self._buffers(max(capacity, end)))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens, for which the buffer must have room."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end

    def drop(self, count: int, capacity: int, scratch: PromptBuffer, *, is_own: bool) -> None:
        """Drop the oldest `count` tokens and keep the rest in a buffer for up to `capacity` tokens.

        The tail's own buffer is used again if it is not larger and `is_own`: it is not the model's
        and was not made for held-back tokens.
        """
        left, current = self.length - count, (self.keys, self.values)
        target = self._own or current
        if not (is_own and left <= target[0].shape[2] <= capacity and is_writable(target[0])):
            target = self._buffers(max(capacity, left))
        self._move(count, target)
        if self._own is not None:
            scratch.give_back(*current)
            self._own = None
        self.length -= count
        if self.labels is not None:
            self.labels = self.labels.narrow(count, left).owned()

    def truncate(self, length: int) -> None:
        self.length = length
        if self.labels is not None:
            self.labels = self.labels.narrow(0, length)

    @property
    def unlabelled(self) -> int:
        """Number of the newest tokens of each row that have no labels yet."""
        return self.length - (0 if self.labels is None else len(self.labels))

    def label(self, labels: TokenTable) -> None:
        self.labels = labels if self.labels is None else self.labels.followed_by(labels)

    def map_rows(self, index: Tensor) -> None:
        self.keys = self.keys.index_select(0, index.to(self.keys.device))
        self.values = self.values.index_select(0, index.to(self.values.device))
        self._own = None
        if self.labels is not None:
            self.labels = self.labels.select_rows(index)

    def view(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, length, D] as views."""
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def span(self, start: int, count: int) -> TokenTable:
        """Return the oldest `count` tokens, the first of them at column `start`."""
        keys, values = self.view()
        states = TokenTable({"keys": keys, "values": values}).narrow(0, count)
        positions = torch.arange(start, start + count, dtype=torch.int32, device=keys.device)
        positions = positions.view(1, 1, -1)
        span = states.with_columns(TokenTable({"positions": positions}))
        return span if self.labels is None else span.with_columns(self.labels.narrow(0, count))

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values, *(self._own or ()))
        if self.labels is not None:
            yield from self.labels.tensors.values()

    def _buffers(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Allocate buffers for `capacity` tokens."""
        keys, values = (
            old.new_empty(*old.shape[:2], capacity, old.shape[3])
            for old in (self.keys, self.values)
        )
        return keys, values

    def _move(self, start: int, buffers: tuple[Tensor, Tensor]) -> None:
        """Move the tokens from `start` on into `buffers`."""
        keep = self.length - start
        for old, new in zip((self.keys, self.values), buffers, strict=True):
            states = old.narrow(2, start, keep)
            new.narrow(2, 0, keep).copy_(states.clone() if new is old else states)
        self.keys, self.values = buffers
