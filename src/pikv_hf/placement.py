"""Where a page lives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Placement(ABC):
    """Chooses the device of a layer's pages. A frozen dataclass without run state."""

    @abstractmethod
    def pool_of(self, key_states: Tensor) -> torch.device:
        """The device for the pages of a layer whose keys arrive as `key_states` [B, H, T, D]."""


@dataclass(frozen=True)
class Local(Placement):
    """Each layer's own device: where accelerate (`device_map`, cpu and disk offload) runs it.

    The device of the keys is the truth: `hf_device_map` names the weights' place, which for an
    offloaded layer is not where it runs.
    """

    def pool_of(self, key_states: Tensor) -> torch.device:
        return key_states.device


PLACEMENTS: dict[str, type[Placement]] = {"auto": Local, "local": Local}
