"""Which tokens stay: one file per method."""

from .adakv import AdaKV
from .base import Scheduler, Tokens
from .chunkkv import ChunkKV
from .criticalkv import CriticalKV
from .expected_attention import ExpectedAttention
from .h2o import H2O
from .fastv import FastV
from .keydiff import KeyDiff
from .knorm import Knorm
from .lagkv import LagKV
from .placed import PlacedTokens
from .lru import LRU
from .lru_plus import LRUPlus
from .pikv_layer_sum import PiKVLayerSum
from .pyramidkv import PyramidKV
from .random import Random
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import Tova

SCHEDULERS: dict[str, type[Scheduler]] = {
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "tova": Tova,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "chunkkv": ChunkKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "criticalkv": CriticalKV,
    "fastv": FastV,
    "pikv_layer_sum": PiKVLayerSum,
    "lagkv": LagKV,
    "expected_attention": ExpectedAttention,
    "lru": LRU,
    "lru_plus": LRUPlus,
    "random": Random,
}

__all__ = [
    "SCHEDULERS",
    "H2O",
    "LRU",
    "LRUPlus",
    "AdaKV",

    "ChunkKV",
    "CriticalKV",
    "ExpectedAttention",
    "FastV",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "PlacedTokens",
    "PiKVLayerSum",
    "PyramidKV",
    "Random",
    "Scheduler",
    "SnapKV",
    "StreamingLLM",
    "Tokens",
    "Tova",
]
