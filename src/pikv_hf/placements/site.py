"""Where a model runs: what a placement must know of it to deal pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..storage.places import Exchange


@dataclass(frozen=True)
class PlacedLayer:
    """A paged layer: its cache layer, its number among the `count` paged layers, its experts."""

    layer_idx: int
    number: int
    count: int
    num_experts: int | None = None


@dataclass(frozen=True)
class Site:
    """The places that a cache may use.

    `devices` are devices of this process; `of_layers` names the devices for each paged layer, if not all
    layers use all devices, and `of_experts` the device of each expert of a layer. If `exchange` is not None, the places are the `size` ranks that share the
    cache, of which this process is number `rank`; it `owns_experts` if rank e * size // E holds the
    weights of expert e of E.
    """

    devices: tuple[torch.device, ...] = ()
    exchange: Exchange | None = None
    rank: int = 0
    size: int = 1
    owns_experts: bool = False
    of_layers: Mapping[int, tuple[torch.device, ...]] = field(default_factory=dict)
    of_experts: Mapping[int, tuple[torch.device, ...]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of places."""
        return len(self.devices) if self.exchange is None else self.size

    def of_layer(self, layer: PlacedLayer) -> "Site":
        """Return the places for the pages of one layer."""
        return replace(self, devices=self.of_layers.get(layer.layer_idx, self.devices))

    def sharing(self, device: torch.device, layer: PlacedLayer) -> int:
        """Return how many layers may have pages on a device that `layer` uses."""
        return sum(device in each for each in self.of_layers.values()) or layer.count


NO_SITE = Site()
