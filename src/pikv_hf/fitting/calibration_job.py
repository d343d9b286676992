"""What is to be fitted, and to how much text."""

from dataclasses import dataclass

from ..compressors import COMPRESSORS, LowRank
from ..schedulers.pikv_quest import NAME as PIKV_QUEST
from ..validation import check_count
from .capture import QUERIES
from .defaults import CALIBRATION_LENGTH, STEPS, WINDOWS

METHODS: dict[str, type[LowRank]] = {
    name: method for name, method in COMPRESSORS.items() if issubclass(method, LowRank)
}
NAMES = (*METHODS, PIKV_QUEST)


@dataclass(frozen=True)
class Job:
    """What is to be fitted, and to how much text.

    Args:
        methods: names of calibrated compressors, or "pikv_quest", which has no `rank`.
        rank: numbers that a key, and a value, is stored as, not more than it has dims; None = a
            quarter of these.
        length: tokens of context in each piece of text.
        windows: pieces, drawn at random, whose keys and values are kept for training, and a quarter
            as many to judge it: the memory that a calibration takes, whatever the texts' length.
            Few windows are learnt by heart.
        steps: of training; 0 = the principal axes as they are, and for `pikv_quest` tokens that are
            all alike.

    Raises:
        ValueError: an argument is not what it must be.
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
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"`steps` is {self.steps!r}; it must be a whole number, 0 or more.")

    @property
    def piece_tokens(self) -> int:
        """Tokens of a piece: the context, one that stays open, and those that ask."""
        return self.length + 1 + QUERIES
