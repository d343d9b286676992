"""Which part of a text is the prompt, and whether it is held back."""

import contextlib
from collections.abc import Generator


class Reading:
    """How the text of a cache is read.

    `is_held`: nothing is sealed, for the time being. `is_block`: within a block of `holding()`, where
    all that is read is one text. `prompt_length`: tokens of the text, cached ones included, before
    the running `generate` makes its first; None = unknown.
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
        """The block is over; the text stays held until `release`."""
        self.is_block = False

    @contextlib.contextmanager
    def prompt(self, length: int | None) -> Generator[None, None, None]:
        """Within the block the first `length` tokens of the text are its prompt."""
        outer, self.prompt_length = self.prompt_length, length
        try:
            yield
        finally:
            self.prompt_length = outer

    def is_prompt(self, seen: int, length: int) -> bool:
        """Whether `length` tokens behind `seen` others are of a prompt, and not generated.

        Outside of `generate` and of `holding()` one token alone is taken for a generated one.
        """
        if self.is_block or self.prompt_length is None:
            return self.is_block or length > 1
        return seen < self.prompt_length

    def __getstate__(self) -> dict[str, bool | None]:
        """What runs around this cache does not run around a copy."""
        return {"is_held": self.is_held, "is_block": False, "prompt_length": None}
