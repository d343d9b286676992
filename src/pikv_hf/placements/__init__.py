"""Where pages live; `PLACEMENTS` lists what a user can name."""

from .base import Placement
from .local import Local
from .offload import Offload

PLACEMENTS: dict[str, type[Placement]] = {"auto": Local, "local": Local, "offload": Offload}

__all__ = ["PLACEMENTS", "Local", "Offload", "Placement"]
