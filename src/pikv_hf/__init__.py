"""PiKVCache: a paged KV cache for Mixture-of-Experts models in Hugging Face transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from . import requirements  # imported first: it refuses versions that are too old

if TYPE_CHECKING:
    from .cache.device_plan import infer_kv_device_map
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
    "infer_kv_device_map",
]

_HOMES = {
    "PiKVCache": "cache.pikv_cache",
    "COMPRESSORS": "compressors",
    "LossWarning": "layer.loss_guard",
    "PLACEMENTS": "placements",
    "ROUTERS": "routers",
    "SCHEDULERS": "schedulers",
    "infer_kv_device_map": "cache.device_plan",
}


# Folders whose classes are public, too: `from pikv_hf import KeyDiff`.
_METHODS = ("schedulers", "compressors", "routers", "placements")


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `pikv --help` needs no torch."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name[:1].isupper():
        value = _method(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _method(name: str) -> Any:
    for folder in _METHODS:
        module = importlib.import_module(f".{folder}", __name__)
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
