"""The base class of placements, which choose the memory of pages."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.places import NewPages, Places
from ..storage.tiers import Tier
from .residency import Residency
from .site import NO_SITE, PlacedLayer, Site


class Placement(ABC):
    """Chooses the memory of a layer's pages. A frozen dataclass without run state."""

    @property
    def needs_labels(self) -> bool:
        """True if pages are dealt by the experts of their tokens."""
        return False

    @abstractmethod
    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        """Return the tiers for pages of one of `layers` layers, which `device` reads.

        Tiers are filled in this order; the last one has no limit.
        """

    def places(self, layer: PlacedLayer, site: Site = NO_SITE) -> Places:
        """Return the places of the pages of `layer`; `site` is where the model runs."""
        return Alone(self, layer.count)

    def copies(self, layers: int) -> tuple[Residency, int] | None:
        """Return the policy and the bytes of copies that one of `layers` keeps on its device.

        They are of pages that a router has read from other memory; None = there are no copies.
        """
        return None

    @property
    def reads_ahead(self) -> bool:
        """True if tiers are to be told before their pages are read."""
        return False


@dataclass(frozen=True)
class Alone(Places):
    """The only place: the tiers of `placement` for one of `layers` layers."""

    placement: Placement
    layers: int

    @property
    def count(self) -> int:
        return 1

    def tiers(self, place: int, device: torch.device) -> list[Tier]:
        return self.placement.tiers(device, self.layers)

    def deal(self, new: NewPages) -> Tensor:
        return torch.zeros_like(new.filled)
