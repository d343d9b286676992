"""Schedulers, which choose the tokens that a cache keeps: one file per method."""

from .adakv import AdaKV
from .base import (
    Candidates,
    Needs,
    RowState,
    Scheduler,
    TokenConstants,
    TokenStatistics,
    Traits,
)
from .chunkkv import ChunkKV
from .criticalkv import CriticalKV
from .duo import Duo
from .expected_attention import ExpectedAttention
from .expert import Expert
from .fastv import FastV
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .kvzip import KVzip
from .lagkv import LagKV
from .lru import LRU
from .lru_plus import LRUPlus
from .pikv_adakv import PiKVAdaKV
from .pikv_layer_sum import PiKVLayerSum
from .pikv_quest import PiKVQuest
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
    "kvzip": KVzip,
    "lagkv": LagKV,
    "expected_attention": ExpectedAttention,
    "expert": Expert,
    "duo": Duo,
    "lru": LRU,
    "lru_plus": LRUPlus,
    "pikv_adakv": PiKVAdaKV,
    "pikv_quest": PiKVQuest,
    "random": Random,
}

__all__ = [
    "H2O",
    "LRU",
    "SCHEDULERS",
    "AdaKV",
    "Candidates",
    "ChunkKV",
    "CriticalKV",
    "Duo",
    "ExpectedAttention",
    "Expert",
    "FastV",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LRUPlus",
    "LagKV",
    "Needs",
    "PiKVAdaKV",
    "PiKVLayerSum",
    "PiKVQuest",
    "PyramidKV",
    "Random",
    "RowState",
    "Scheduler",
    "SnapKV",
    "StreamingLLM",
    "TokenConstants",
    "TokenStatistics",
    "Tova",
    "Traits",
]
