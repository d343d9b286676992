"""Pages on the device of their layer."""

from dataclasses import dataclass

import torch

from ..storage.tiers import Near, Tier
from .base import Placement


@dataclass(frozen=True)
class Local(Placement):
    """Keeps pages where accelerate (`device_map`, cpu and disk offload) runs their layer.

    That is the device of the keys. `hf_device_map` names the place of the weights, where an
    offloaded layer does not run.
    """

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        return [Near(device)]
