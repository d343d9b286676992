"""The text of `--cache`: which cache it means."""

import pytest

from pikv_hf import PiKVCache
from pikv_hf.cache.from_text import parse_cache
from pikv_hf.compressors import Int8
from pikv_hf.placements import Offload
from pikv_hf.schedulers import AdaKV, KeyDiff, KVzip, PyramidKV, StreamingLLM


@pytest.mark.parametrize(
    ("text", "arguments", "label"),
    [
        ("dynamic", None, "DynamicCache"),
        ("lossless", {}, "PiKVCache, lossless"),
        ("compressor=int8", {"compressor": Int8()}, "int8"),
        (
            " scheduler=streaming_llm, budget=0.25,compressor='int8' ",
            {"scheduler": StreamingLLM(), "budget": 0.25, "compressor": Int8()},
            "streaming_llm, budget=0.25, 'int8'",
        ),
        (
            "scheduler=streaming_llm(sinks=8, window=56),page_size=16",
            {"scheduler": StreamingLLM(sinks=8, window=56), "page_size": 16},
            "streaming_llm(sinks=8, window=56), page_size=16",
        ),
        ("int8", {"compressor": Int8()}, "int8"),
        ("keydiff,budget=25%", {"scheduler": KeyDiff(), "budget": 0.25}, "keydiff, budget=0.25"),
        (
            "scheduler=keydiff,budget=2GiB",
            {"scheduler": KeyDiff(), "budget": "2GiB"},
            "keydiff, budget='2GiB'",
        ),
        (
            "PyramidKV(AdaKV(KeyDiff())), budget=12.5 %",
            {"scheduler": PyramidKV(AdaKV(KeyDiff())), "budget": 0.125},
            "PyramidKV(AdaKV(KeyDiff())), budget=0.125",
        ),
        (
            "int8(rotate=true),hold_prompt=false,router=none",
            {"compressor": Int8(rotate=True), "hold_prompt": False, "router": None},
            "int8(rotate=true), hold_prompt=false, none",
        ),
        (
            "kvzip,budget=64",
            {"scheduler": KVzip(), "budget": 64, "hold_prompt": True},
            "kvzip, budget=64",
        ),
        (
            "offload(device_bytes=1GiB, ram_bytes=2 GiB, offload_folder='/tmp')",
            {"placement": Offload("1GiB", "2 GiB", "/tmp")},
            "offload(device_bytes='1GiB', ram_bytes='2 GiB', offload_folder='/tmp')",
        ),
    ],
)
def test_text_of_a_cache(text, arguments, label):
    option = parse_cache(text)
    assert option.arguments == arguments
    assert option.label == label


def test_cache_is_made_with_its_arguments(bundled):
    cache = parse_cache("compressor=int8,page_size=32").make(bundled[0])
    assert isinstance(cache, PiKVCache)
    assert cache.settings.compressor == Int8()
    assert cache.settings.page_size == 32
