"""The part of a text that is the prompt, and whether sealing is held back."""

import contextlib
from collections.abc import Generator


class Reading:
    """The state of reading the text of a cache.

    `is_held`: nothing is sealed at present. `is_block`: within a block of `holding()`, in which all
    tokens are one text. `prompt_length`: tokens, cached ones included, before the first one that
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
        """End the block; the text is held until `release`."""
        self.is_block = False

    @contextlib.contextmanager
    def prompt(self, length: int | None) -> Generator[None, None, None]:
        """Treat the first `length` tokens of the text as its prompt, within a block."""
        outer, self.prompt_length = self.prompt_length, length
        try:
            yield
        finally:
            self.prompt_length = outer

    def is_prompt(self, seen: int, length: int) -> bool:
        """Return True if `length` tokens behind `seen` others are of a prompt, not generated.

        Outside of `generate` and `holding()`, a single token counts as generated.
        """
        if self.is_block or self.prompt_length is None:
            return self.is_block or length > 1
        return seen < self.prompt_length

    def is_decoding(self, seen: int) -> bool:
        """Return True if the running `generate` makes what comes behind `seen` tokens."""
        return self.prompt_length is not None and seen >= self.prompt_length

    def __getstate__(self) -> dict[str, bool | None]:
        """Leave out what runs around this cache, as it does not run around a copy."""
        return {"is_held": self.is_held, "is_block": False, "prompt_length": None}
