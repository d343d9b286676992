from dataclasses import dataclass

from .page_router import SIZES, check_share
from .quest import Quest


@dataclass(frozen=True)
class Adaptive(Quest):
    """Reads as many pages as a query needs for `target` of its attention, as Quest's bounds see it.

    It is Quest with `top_p`: the fewest pages whose part in the softmax of the bounds is `target`.
    The bounds of other pages than the best are looser, so more pages are read than needed. PiKV's
    R_A (arXiv 2508.06526, table 1), which is "learned" there without a definition.
    """

    target: float = 0.95

    def __post_init__(self) -> None:
        given = [name for name in SIZES if getattr(self, name) not in (None, self.target)]
        if given:
            raise ValueError(
                f"`{given[0]}` is {getattr(self, given[0])!r}, but `target` decides how many pages "
                "adaptive reads: use quest for another size."
            )
        check_share("target", self.target)
        object.__setattr__(self, "top_p", self.target)
        super().__post_init__()
