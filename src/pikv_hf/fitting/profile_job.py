"""The arguments of a profile."""

from dataclasses import dataclass

from ..validation import check_count, check_whole
from .defaults import PROFILE_LENGTH, RECENT, SINKS, TEXTS
from .head_effect import QUERIES


@dataclass(frozen=True)
class Job:
    """The arguments of a profile.

    Args:
        length: tokens of a text.
        texts: number of texts that are generated if none are given.
        sinks: first tokens that a streaming head reads.
        recent: newest tokens that a streaming head reads.

    Raises:
        ValueError: an argument has a wrong type or is out of range.
    """

    length: int = PROFILE_LENGTH
    texts: int = TEXTS
    sinks: int = SINKS
    recent: int = RECENT

    def __post_init__(self) -> None:
        for name in ("length", "texts", "recent"):
            check_count(name, getattr(self, name))
        check_whole("sinks", self.sinks)
        min_length = self.sinks + self.recent + QUERIES
        if self.length < min_length:
            raise ValueError(
                f"`length` is {self.length}; it must be {min_length} or more (sinks, recent "
                f"tokens, {QUERIES} for queries): in a shorter text a head has little else to read."
            )
