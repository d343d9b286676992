"""Each layer's own device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Placement


@dataclass(frozen=True)
class Local(Placement):
    """Each layer's own device: where accelerate (`device_map`, cpu and disk offload) runs it.

    The device of the keys is the truth: `hf_device_map` names the weights' place, which for an
    offloaded layer is not where it runs.
    """

    def pool_of(self, key_states: Tensor) -> torch.device:
        return key_states.device
