"""How a sealed page is stored: one file per method."""

from .base import Compressor, flat_tokens
from .fp8 import Fp8
from .identity import Identity
from .integer import Int2, Int4, Int8, Integer
from .turboquant import TurboQuant

COMPRESSORS: dict[str, type[Compressor]] = {
    "identity": Identity,
    "int8": Int8,
    "int4": Int4,
    "int2": Int2,
    "fp8": Fp8,
    "turboquant": TurboQuant,
}

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Fp8",
    "Identity",
    "Int2",
    "Int4",
    "Int8",
    "Integer",
    "TurboQuant",
    "flat_tokens",
]
