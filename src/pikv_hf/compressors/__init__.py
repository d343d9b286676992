"""How a sealed page is stored: one file per method."""

from .base import Compressor, flat_tokens
from .identity import Identity
from .int8 import Int8

COMPRESSORS: dict[str, type[Compressor]] = {"identity": Identity, "int8": Int8}

__all__ = ["COMPRESSORS", "Compressor", "Identity", "Int8", "flat_tokens"]
