"""PiKVCache: a paged KV cache for Mixture-of-Experts models in Hugging Face transformers."""

from . import requirements  # first: it refuses versions that are too old
from .cache import PiKVCache
from .compressors import COMPRESSORS
from .guard import LossWarning
from .placement import PLACEMENTS
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
