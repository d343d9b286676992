"""The base class of placements that deal pages to devices or ranks.

Shapes: R rows, H KV heads, S new pages.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..storage.places import Exchange, NewPages, Places
from ..storage.tiers import Elsewhere, Near, Remote, Tier
from .base import Placement
from .local import Local
from .offload import Offload
from .site import NO_SITE, PlacedLayer, Site


@dataclass(frozen=True, kw_only=True)
class Sharding(Placement):
    """Deals the pages of each layer to places: devices of this process, or ranks of a process group.

    Each place attends to its own pages: queries travel to devices, and outputs with their
    log-sum-exp travel back, but keys and values never do. Tail tokens (`window`), positions, labels
    and what a router reads of pages are on the device of their layer, or on every rank.

    Args:
        devices: devices of this process that hold pages; None = all on which attention layers run.
        process_group: ranks that share one cache: a `ProcessGroup`, a `DeviceMesh` of one dimension,
            or of two (node, rank), so that what leaves a node does not grow with its ranks. All ranks
            must run the same model on the same batch. None = the ranks that transformers' expert
            parallelism lets share a batch, if there are any, or else `devices`.
        offload: where each place keeps its pages beyond a limit; None = there is no limit.
    """

    devices: Sequence[str | int | torch.device] | None = None
    process_group: Any = field(default=None, repr=False)
    offload: Offload | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.offload, Offload | None):
            raise TypeError(f"`offload` is {self.offload!r}; it must be an Offload or None.")
        if self.offload is not None and self.offload.residency is not None:
            raise ValueError(
                f"`offload` is {self.offload}, whose `residency` keeps copies for one device: leave it "
                "out where pages are spread."
            )
        if self.devices is not None:
            if self.process_group is not None:
                raise ValueError("`devices` and `process_group` are given: give one of them.")
            object.__setattr__(self, "devices", checked_devices(self.devices))
            if not self.devices:
                raise ValueError("`devices` is empty; it must name devices, or be None for all.")

    @abstractmethod
    def deal(self, new: NewPages, places: "Dealt") -> Tensor:
        """Return the place of each of the `new` pages, [R, H, S]."""

    def check(self, count: int) -> None:
        """Raise ValueError if pages cannot be dealt to `count` places."""

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        return (self.offload or Local()).tiers(device, layers)

    def places(self, layer: PlacedLayer, site: Site = NO_SITE) -> Places:
        return Dealt(self, layer, site.of_layer(layer))

    @property
    def reads_ahead(self) -> bool:
        return self.offload is not None and self.offload.reads_ahead


@dataclass(frozen=True)
class Dealt(Places):
    """The places at `site` to which `method` deals the pages of `layer`."""

    method: Sharding
    layer: PlacedLayer
    site: Site

    @property
    def count(self) -> int:
        return self.site.count

    def name(self, place: int) -> str:
        return f"rank {place}" if self.exchange else str(self.site.devices[place])

    @property
    def by_experts(self) -> bool:
        return self.method.needs_labels

    @property
    def exchange(self) -> Exchange | None:
        return self.site.exchange

    def tiers(self, place: int, device: torch.device) -> list[Tier]:
        if self.exchange is not None:
            own = place == self.site.rank
            return self.method.tiers(device, self.layer.count) if own else [Remote(device)]
        there = self.site.devices[place]
        tiers = self.method.tiers(there, self.site.sharing(there, self.layer))
        if there == device:
            return tiers
        return [Elsewhere(t.device, t.limit) if isinstance(t, Near) else t for t in tiers]

    def deal(self, new: NewPages) -> Tensor:
        return self.method.deal(new, self)


def in_turn(new: NewPages, places: Dealt) -> Tensor:
    """Deal pages to the places in turn, in each layer beginning with another place."""
    is_page = new.filled > 0
    number = (is_page.flatten().cumsum(0) - 1).clamp_min(0).view(is_page.shape)
    return (places.layer.number + new.dealt + number) % places.count


def checked_devices(devices: Any, name: str = "devices") -> tuple[torch.device, ...]:
    """Return `devices`, the argument `name`, as torch devices with an index, each once.

    Raises:
        TypeError, ValueError: `devices` is no list of devices that this process has.
    """
    if isinstance(devices, str | int | torch.device):
        devices = [devices]
    if not isinstance(devices, Iterable):
        raise TypeError(f"`{name}` is {devices!r}; it must be a list of devices, such as 'cuda:1'.")
    found = []
    for given in devices:
        if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
            raise TypeError(f"`{name}` has {given!r}; it must have devices, such as 'cuda:1' or 1.")
        try:
            device = torch.device(given)
            device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"`{name}` has {given!r}, which this process does not have: {str(error).splitlines()[0]}"
            ) from error
        if device.type == "meta":
            raise ValueError(f"`{name}` has {given!r}, which holds no data; give a real device.")
        found.append(device)
    if len(set(found)) != len(found):
        raise ValueError(f"`{name}` is {list(map(str, found))}; each device must be named once.")
    return tuple(found)
