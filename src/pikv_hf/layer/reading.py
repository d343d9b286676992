"""The state of reading a text: where its prompt ends, and if sealing is held back."""

import contextlib
from collections.abc import Generator


class Reading:
    """The state of reading the text of a cache.

    `is_held`: nothing is sealed at present. `is_block`: a block of `holding()` runs, in which all
    tokens are prompt. `prompt_length`: tokens, cached ones included, before the first one that
    the running `generate` makes; None = unknown.
    """

    def __init__(self) -> None:
        self.is_held = self.is_block = False
        self.prompt_length: int | None = None

    def hold(self) -> None:
        self.is_held = True

    def release(self) -> None:
        self.is_held = False

    def begin_block(self) -> None:
        self.is_held = self.is_block = True

    def end_block(self) -> None:
        """End the block of `holding()`; sealing is held back until `release`."""
        self.is_block = False

    @contextlib.contextmanager
    def prompt(self, length: int | None) -> Generator[None, None, None]:
        """Set `prompt_length` to `length` for the duration of a `with` statement."""
        outer, self.prompt_length = self.prompt_length, length
        try:
            yield
        finally:
            self.prompt_length = outer

    def is_prompt(self, seen: int, length: int) -> bool:
        """Return True if the next `length` tokens, after `seen` tokens, are prompt, not generated.

        If neither `generate` nor `holding()` runs, a single token counts as generated.
        """
        if self.is_block or self.prompt_length is None:
            return self.is_block or length > 1
        return seen < self.prompt_length

    def is_decoding(self, seen: int) -> bool:
        """Return True if the running `generate` made the tokens behind the first `seen`."""
        return self.prompt_length is not None and seen >= self.prompt_length

    def __getstate__(self) -> dict[str, bool | None]:
        """Leave out the running block and `generate`, which a copy does not take part in."""
        return {"is_held": self.is_held, "is_block": False, "prompt_length": None}
