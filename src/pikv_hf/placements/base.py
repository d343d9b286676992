"""The base class of placements, which choose the memory of pages."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..storage.tiers import Near, Tier


class Placement(ABC):
    """Chooses the memory of a layer's pages. A frozen dataclass without run state."""

    @abstractmethod
    def pool_of(self, key_states: Tensor) -> torch.device:
        """Return the device for the pages of a layer whose keys are `key_states` [B, H, T, D]."""

    def tiers_of(self, layers: int, like: Tensor) -> list[Tier]:
        """Return the tiers of a layer with tensors like `like`, one of `layers` layers."""
        return self.tiers(self.pool_of(like), layers)

    @property
    def reads_ahead(self) -> bool:
        """True if tiers are to be told of pages before these are read."""
        return False

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        """Return the kinds of memory for pages read on `device`, for one of `layers` layers.

        They are filled in this order; the last one has no limit.
        """
        return [Near(device)]
