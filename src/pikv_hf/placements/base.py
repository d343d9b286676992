"""The base class of placements, which choose the memory of pages."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..storage.tiers import Tier
from .residency import Residency


class Placement(ABC):
    """Chooses the memory of a layer's pages. A frozen dataclass without run state."""

    @abstractmethod
    def place(self, states: Tensor, layers: int) -> list[Tier]:
        """Return the tiers of a layer, one of `layers`, whose keys are like `states` [B, H, T, D].

        Tiers are filled in this order; the last one has no limit.
        """

    def copies(self, layers: int) -> tuple[Residency, int] | None:
        """Return the policy and the bytes of copies that one of `layers` keeps on its device.

        They are of pages that a router has read from other memory; None = there are no copies.
        """
        return None

    @property
    def reads_ahead(self) -> bool:
        """True if tiers are to be told before their pages are read."""
        return False
