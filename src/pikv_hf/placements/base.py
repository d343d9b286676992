"""Where a page lives."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..storage.tiers import Near, Tier


class Placement(ABC):
    """Chooses the device of a layer's pages. A frozen dataclass without run state."""

    @abstractmethod
    def pool_of(self, key_states: Tensor) -> torch.device:
        """The device for the pages of a layer whose keys arrive as `key_states` [B, H, T, D]."""

    def tiers_of(self, layers: int, like: Tensor) -> list[Tier]:
        """`tiers` where a tensor like `like` of a layer belongs."""
        return self.tiers(self.pool_of(like), layers)

    @property
    def reads_ahead(self) -> bool:
        """Whether tiers want to know of pages before they are read."""
        return False

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        """The kinds of memory for pages that are read on `device`, in one of so many layers.

        They are filled in this order; the last one has no limit.
        """
        return [Near(device)]
