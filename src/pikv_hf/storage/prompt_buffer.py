"""Buffers for the tokens of a long forward pass, used by one layer after another."""

from collections.abc import Iterator

from torch import Tensor

from .memory import is_writable


class PromptBuffer:
    """A pair of buffers for keys and values, lent to one layer at a time.

    If each layer allocated and freed buffers of its own for a chunk of the prompt, the allocator
    would be left with a hole per layer and chunk.
    """

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    def lend(self, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return buffers like `keys` and `values` [B, H, ..., D] for at least `tokens` tokens."""
        pair, self._pair = self._pair, None
        if pair is not None and all(
            _fits(buffer, new, tokens) for buffer, new in zip(pair, (keys, values), strict=True)
        ):
            return pair
        del pair  # freed before a new pair is made
        keys, values = (t.new_empty(*t.shape[:2], tokens, t.shape[3]) for t in (keys, values))
        return keys, values

    def give_back(self, keys: Tensor, values: Tensor) -> None:
        self._pair = keys, values

    def tensors(self) -> Iterator[Tensor]:
        yield from self._pair or ()


def _fits(buffer: Tensor, states: Tensor, tokens: int) -> bool:
    """Return True if `buffer` can hold `tokens` tokens like `states`."""
    is_alike = (*buffer.shape[:2], buffer.shape[3], buffer.dtype, buffer.device) == (
        *states.shape[:2],
        states.shape[3],
        states.dtype,
        states.device,
    )
    return is_alike and buffer.shape[2] >= tokens and is_writable(buffer)
