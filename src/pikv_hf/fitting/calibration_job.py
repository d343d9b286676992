"""The arguments of a calibration."""

from dataclasses import dataclass

from ..compressors import COMPRESSORS, LowRank
from ..schedulers.pikv_quest import NAME as PIKV_QUEST
from ..validation import check_count, check_whole
from .capture import QUERIES
from .defaults import CALIBRATION_LENGTH, STEPS, WINDOWS

METHODS: dict[str, type[LowRank]] = {
    name: method for name, method in COMPRESSORS.items() if issubclass(method, LowRank)
}
NAMES = (*METHODS, PIKV_QUEST)


@dataclass(frozen=True)
class Job:
    """The arguments of a calibration.

    Args:
        methods: names of calibrated compressors, or "pikv_quest", which has no `rank`.
        rank: numbers that a key, and a value, is stored as, at most its head dim; None = a quarter
            of the head dim.
        length: tokens of context in each piece of text.
        windows: pieces, drawn at random, whose keys and values are kept for training; a quarter as
            many others are kept to judge it. Their number, not the length of the texts, determines
            the memory that a calibration takes. With few windows, training overfits.
        steps: training steps; 0 = no training: principal axes, and for `pikv_quest` equal scores
            of all tokens.

    Raises:
        ValueError: an argument has a wrong type or is out of range.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    rank: int | None = None
    length: int = CALIBRATION_LENGTH
    windows: int = WINDOWS
    steps: int = STEPS

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in NAMES]
        if unknown or not self.methods:
            raise ValueError(
                f"`methods` are {[*self.methods]}; they must be among {[*NAMES]}, at least one."
            )
        if self.rank is not None:
            check_count("rank", self.rank)
        for name in ("length", "windows"):
            check_count(name, getattr(self, name))
        check_whole("steps", self.steps)

    @property
    def piece_tokens(self) -> int:
        """Tokens of a piece: the context, one token that stays in the tail, and `QUERIES` more."""
        return self.length + 1 + QUERIES
