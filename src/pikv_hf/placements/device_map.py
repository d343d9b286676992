"""Pages on the devices that a map names, by layer and by expert.

Shapes: R rows, H KV heads, S new pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..storage.places import NewPages
from ..storage.tiers import Ram, Tier
from ..validation import check_bytes
from .experts import top_experts
from .kv_device_map import LayerDevices, check_mapping, device_of_layers
from .sharding import Dealt, Sharding, checked_devices
from .site import Site

Device = int | str | torch.device


@dataclass(frozen=True, kw_only=True)
class DeviceMap(Sharding):
    """Keeps the pages of each layer on the device that `kv_device_map` names, in accelerate's style.

    Keys are prefixes of modules, of which the most specific counts: "layers.0-11", "layers.12",
    "layers.12.experts.0-31", "" for the rest. A page goes to the device of the expert with the largest
    share in its tokens, if the map names experts of its layer.

    Args:
        kv_device_map: devices by key. They need not be the devices where the layers run: each attends
            to its own pages.
        max_memory: bytes of pages (a number, or text such as "8GiB") by device. The layers with pages on
            a device share them equally; pages beyond are in the CPU's memory.
    """

    kv_device_map: Mapping[str, Device]
    max_memory: Mapping[Device, int | str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices is not None or self.process_group is not None or self.offload is not None:
            raise ValueError(
                "`kv_device_map` names the devices of pages: leave out `devices`, `process_group` and "
                "`offload`; `max_memory` limits a device."
            )
        check_mapping(self.kv_device_map)
        if not isinstance(self.max_memory, Mapping | None):
            raise TypeError(
                f"`max_memory` is {self.max_memory!r}; it must be a mapping of devices to bytes, or None."
            )
        for name, nbytes in (self.max_memory or {}).items():
            check_bytes(f"max_memory[{name!r}]", nbytes)

    @property
    def needs_labels(self) -> bool:
        return any(".experts." in str(key) for key in self.kv_device_map)

    def site(self, layers: Sequence[int], num_experts: Mapping[int, int | None]) -> Site:
        """Return the places of these paged layers; `num_experts` are of all layers of the model.

        Raises:
            ValueError: the map misses a layer, or names devices, layers or experts that do not exist;
                `max_memory` names a device that is not in the map.
        """
        found = device_of_layers(self.kv_device_map, layers, num_experts)
        of_layers = {idx: _all_of(layer) for idx, layer in found.items()}
        devices = dict.fromkeys(device for each in of_layers.values() for device in each)
        for given in self.max_memory or ():
            if checked_devices([given], "max_memory")[0] not in devices:
                raise ValueError(
                    f"`max_memory` has {given!r}, but `kv_device_map` keeps pages on "
                    f"{[*map(str, devices)]}: name one of these."
                )
        of_experts = {idx: x.of_experts for idx, x in found.items() if x.of_experts is not None}
        return Site(devices=tuple(devices), of_layers=of_layers, of_experts=of_experts)

    def deal(self, new: NewPages, places: Dealt) -> Tensor:
        devices, of_experts = places.site.devices, places.site.of_experts
        experts = top_experts(new, places)
        if experts is None or places.layer.layer_idx not in of_experts:
            return torch.zeros_like(new.filled)  # the device of the layer comes first
        owners = [devices.index(device) for device in of_experts[places.layer.layer_idx]]
        return torch.tensor(owners, device=experts.device)[experts]

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        tiers = super().tiers(device, layers)
        for given, nbytes in (self.max_memory or {}).items():
            if checked_devices([given]) == (device,):
                limit = check_bytes("max_memory", nbytes) // layers
                return [*(replace(tier, limit=limit) for tier in tiers), Ram(device)]
        return tiers


def _all_of(layer: LayerDevices) -> tuple[torch.device, ...]:
    """Return the devices of a layer, each once."""
    return tuple(dict.fromkeys((layer.device, *(layer.of_experts or ()))))
