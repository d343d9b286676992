"""Compressors, which encode sealed pages: one file per method."""

from .base import Compressor
from .distill import Distill
from .fp8 import Fp8
from .identity import Identity
from .integer import Int2, Int4, Int8, Integer
from .lowrank import LowRank, LowRankAffine
from .mixed import MixedCompressor
from .pikv import PiKV
from .pyramid import Pyramid
from .svd import Svd
from .think import ThinK
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
    "think": ThinK,
    "pyramid": Pyramid,
    "pikv": PiKV,
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
    "PiKV",
    "Pyramid",
    "Svd",
    "ThinK",
    "TurboQuant",
]
