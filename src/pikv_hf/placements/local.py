"""Pages on the device of their layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Placement


@dataclass(frozen=True)
class Local(Placement):
    """Keeps pages where accelerate (`device_map`, cpu and disk offload) runs their layer.

    That is the device of the keys. `hf_device_map` names the place of the weights, which for an
    offloaded layer is not where it runs.
    """

    def pool_of(self, key_states: Tensor) -> torch.device:
        return key_states.device
