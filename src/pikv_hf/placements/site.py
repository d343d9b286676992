"""Where a model runs: what a placement must know of it to deal pages."""

from dataclasses import dataclass

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

    `devices` are the devices of this process on which attention layers run. If `exchange` is not None,
    the places are the `size` ranks that share the cache, of which this process is number `rank`.
    """

    devices: tuple[torch.device, ...] = ()
    exchange: Exchange | None = None
    rank: int = 0
    size: int = 1

    @property
    def count(self) -> int:
        """Number of places."""
        return len(self.devices) if self.exchange is None else self.size


NO_SITE = Site()
