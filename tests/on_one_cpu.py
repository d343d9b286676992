"""Several places that are one CPU: pages are dealt to stores of their own, in one process."""

from dataclasses import dataclass, field

import torch

from pikv_hf.placements import Placement, Sharding, Spread
from pikv_hf.placements.sharding import Dealt
from pikv_hf.placements.site import NO_SITE, PlacedLayer, Site
from pikv_hf.storage.tiers import Tier

CPU = torch.device("cpu")


def places_of(method: Sharding, count: int, layer: PlacedLayer | None = None) -> Dealt:
    """Return `count` places to which `method` deals the pages of `layer`."""
    return Dealt(method, layer or PlacedLayer(0, 0, 1), Site(devices=(CPU,) * count))


@dataclass(frozen=True)
class OnOneCpu(Placement):
    """Deals pages by `method` to `count` places that are all the CPU."""

    count: int
    method: Sharding = field(default_factory=Spread)

    @property
    def needs_labels(self) -> bool:
        return self.method.needs_labels

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        return self.method.tiers(device, layers)

    def places(self, layer: PlacedLayer, site: Site = NO_SITE) -> Dealt:
        return places_of(self.method, self.count, layer)
