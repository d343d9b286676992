"""PiKVCache: a paged KV cache for Mixture-of-Experts models in Hugging Face transformers."""

__version__ = "0.1.0"

from . import requirements  # noqa: F401  first: it refuses versions that are too old
from .cache import PiKVCache
from .compressors import COMPRESSORS
from .guard import LossWarning
from .placement import PLACEMENTS
from .routers import ROUTERS
from .schedulers import SCHEDULERS

__all__ = [
    "COMPRESSORS",
    "PLACEMENTS",
    "ROUTERS",
    "SCHEDULERS",
    "LossWarning",
    "PiKVCache",
    "__version__",
]
