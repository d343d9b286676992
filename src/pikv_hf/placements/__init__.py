"""Placements, which choose the memory of pages; `PLACEMENTS` has the names for users."""

from .base import Placement
from .device_map import DeviceMap
from .experts import Experts
from .local import Local
from .offload import Offload
from .pikv_xor import PiKVXor
from .residency import RESIDENCIES, Residency
from .sharding import Sharding
from .spread import Spread

PLACEMENTS: dict[str, type[Placement]] = {
    "auto": Local,
    "local": Local,
    "offload": Offload,
    "spread": Spread,
    "experts": Experts,
    "pikv_xor": PiKVXor,
}

__all__ = [
    "PLACEMENTS",
    "RESIDENCIES",
    "DeviceMap",
    "Experts",
    "Local",
    "Offload",
    "PiKVXor",
    "Placement",
    "Residency",
    "Sharding",
    "Spread",
]
