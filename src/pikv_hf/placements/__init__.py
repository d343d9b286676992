"""Placements, which choose the memory of pages; `PLACEMENTS` has the names for users."""

from .base import Placement
from .local import Local
from .offload import Offload
from .residency import RESIDENCIES, Residency

PLACEMENTS: dict[str, type[Placement]] = {"auto": Local, "local": Local, "offload": Offload}

__all__ = ["PLACEMENTS", "RESIDENCIES", "Local", "Offload", "Placement", "Residency"]
