"""How a sealed page is stored: one file per method."""

from .base import Compressor, flat_tokens
from .distill import Distill
from .fp8 import Fp8
from .identity import Identity
from .integer import Int2, Int4, Int8, Integer
from .lowrank import LowRank, LowRankAffine
from .mixed import MixedCompressor
from .svd import Svd
from .turboquant import TurboQuant

COMPRESSORS: dict[str, type[Compressor]] = {
    "identity": Identity,
    "int8": Int8,
    "int4": Int4,
    "int2": Int2,
    "fp8": Fp8,
    "turboquant": TurboQuant,
    "svd": Svd,
    "lowrank": LowRank,
    "lowrank_affine": LowRankAffine,
    "distill": Distill,
}

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Distill",
    "Fp8",
    "Identity",
    "Int2",
    "Int4",
    "Int8",
    "Integer",
    "LowRank",
    "LowRankAffine",
    "MixedCompressor",
    "Svd",
    "TurboQuant",
    "flat_tokens",
]
