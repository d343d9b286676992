"""What is to be profiled, on which texts."""

from dataclasses import dataclass

from ..validation import check_count
from .defaults import PROFILE_LENGTH, RECENT, SINKS, TEXTS
from .head_effect import QUERIES


@dataclass(frozen=True)
class Job:
    """What is to be profiled, on which texts.

    Args:
        length: tokens of a text.
        texts: how many are made, if none are given.
        sinks: first tokens that a streaming head reads.
        recent: newest tokens that it reads.

    Raises:
        ValueError: an argument is not what it must be.
    """

    length: int = PROFILE_LENGTH
    texts: int = TEXTS
    sinks: int = SINKS
    recent: int = RECENT

    def __post_init__(self) -> None:
        for name in ("length", "texts", "recent"):
            check_count(name, getattr(self, name))
        if not isinstance(self.sinks, int) or isinstance(self.sinks, bool) or self.sinks < 0:
            raise ValueError(f"`sinks` is {self.sinks!r}; it must be a whole number, 0 or more.")
        least = self.sinks + self.recent + QUERIES
        if self.length < least:
            raise ValueError(
                f"`length` is {self.length}; it must be {least} or more: sinks, recent tokens and the "
                f"{QUERIES} that ask, or no head could show that it reads anything else."
            )
