"""The base class of placements, which choose the memory of pages."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..storage.tiers import Tier


class Placement(ABC):
    """Chooses the memory of a layer's pages. A frozen dataclass without run state."""

    @abstractmethod
    def place(self, states: Tensor, layers: int) -> list[Tier]:
        """Return the kinds of memory for pages of keys `states` [B, H, T, D] of one of `layers`.

        They are filled in this order; the last one has no limit. Pages are read on its device.
        """

    @property
    def reads_ahead(self) -> bool:
        """True if tiers are to be told of pages before these are read."""
        return False
