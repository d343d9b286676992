"""The base class of placements, which choose the memory of pages."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..storage.tiers import Tier


class Placement(ABC):
    """Chooses the memory of a layer's pages. A frozen dataclass without run state."""

    @abstractmethod
    def place(self, states: Tensor, layers: int) -> list[Tier]:
        """Return the tiers of a layer, one of `layers`, whose keys are like `states` [B, H, T, D].

        Tiers are filled in this order; the last one has no limit.
        """

    @property
    def reads_ahead(self) -> bool:
        """True if tiers are to be told before their pages are read."""
        return False
