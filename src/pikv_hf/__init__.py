"""PiKVCache: a paged KV cache for Mixture-of-Experts models in Hugging Face transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from . import requirements  # first: it refuses versions that are too old

if TYPE_CHECKING:
    from .cache.pikv_cache import PiKVCache
    from .compressors import COMPRESSORS
    from .layer.loss_guard import LossWarning
    from .placements import PLACEMENTS
    from .routers import ROUTERS
    from .schedulers import SCHEDULERS

__version__ = requirements.VERSION

__all__ = [
    "COMPRESSORS",
    "PLACEMENTS",
    "ROUTERS",
    "SCHEDULERS",
    "LossWarning",
    "PiKVCache",
    "__version__",
]

_HOMES = {
    "PiKVCache": "cache.pikv_cache",
    "COMPRESSORS": "compressors",
    "LossWarning": "layer.loss_guard",
    "PLACEMENTS": "placements",
    "ROUTERS": "routers",
    "SCHEDULERS": "schedulers",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `pikv --help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
