"""What is refused when a cache is made: with one clear error, and the model is left alone."""

import types

import pytest
import torch
from helpers import PADDED, SMALL, assert_close, assert_same, dynamic, generate, tiny
from torch import nn
from transformers import AutoConfig, BertConfig, DynamicCache, GenerationConfig
from zoo import build, prompt

from pikv_hf import COMPRESSORS, PLACEMENTS, ROUTERS, SCHEDULERS, PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.placements import Sharding
from pikv_hf.schedulers import ChunkKV, PyramidKV, Random, SnapKV, StreamingLLM

BAD_ARGUMENTS = [
    ({"compressor": "int9"}, ValueError, r"`compressor` is 'int9'.*int8"),
    ({"scheduler": "streamingllm"}, ValueError, r"`scheduler`.*'streaming_llm'"),
    ({"router": "al"}, ValueError, r"`router` is 'al'.*'all'"),
    ({"placement": "lokal"}, ValueError, r"`placement` is 'lokal'.*'local'"),
    ({"compressor": "xyz"}, ValueError, r"one of \[.*'identity', 'int2'"),
    ({"compressor": 8}, TypeError, r"`compressor` is a int"),
    ({"scheduler": COMPRESSORS["int8"]()}, TypeError, r"`scheduler`.*Int8"),
    ({"router": dict}, TypeError, r"`router`"),
    ({"placement": torch.device("cpu")}, TypeError, r"`placement` is a device"),
    ({"page_size": 0}, ValueError, r"`page_size` is 0"),
    ({"page_size": 2.5}, ValueError, r"`page_size` is 2.5"),
    ({"page_size": True}, ValueError, r"`page_size` is True"),
    ({"page_size": None}, ValueError, r"`page_size` is None"),
    ({"window": 0}, ValueError, r"`window` is 0"),
    ({"window": -1}, ValueError, r"`window` is -1"),
    ({"window": "8"}, ValueError, r"`window` is '8'"),
    ({"budget": 64}, ValueError, r"`budget` is 64.*`scheduler`"),
    ({"budget": 0, "scheduler": "streaming_llm"}, ValueError, r"`budget` is 0"),
    ({"budget": -5, "scheduler": "streaming_llm"}, ValueError, r"`budget` is -5"),
    ({"budget": 1.5, "scheduler": "streaming_llm"}, ValueError, r"`budget` is 1.5"),
    ({"budget": float("nan"), "scheduler": "streaming_llm"}, ValueError, r"`budget` is nan"),
    ({"budget": True, "scheduler": "streaming_llm"}, ValueError, r"`budget` is True"),
    ({"budget": "half", "scheduler": "streaming_llm"}, ValueError, r"`budget` is 'half'"),
    ({"budget": 32, "window": 32, "scheduler": "streaming_llm"}, ValueError, r"`window` is 32"),
    ({"window": 64, "scheduler": StreamingLLM(4, 32)}, ValueError, r"`window` is 64"),
    ({"config": AutoConfig}, (TypeError, ValueError), r"`config`|exactly one"),
    ({"sheduler": "h2o"}, TypeError, r"sheduler"),
]


@pytest.mark.parametrize("arguments, error, match", BAD_ARGUMENTS, ids=lambda x: str(x)[:50])
def test_arguments(arguments, error, match) -> None:
    model = build_once()
    with pytest.raises(error, match=match):
        PiKVCache(model, **arguments)
    assert_untouched(model)


def build_once():
    return tiny("mixtral")


def assert_untouched(model) -> None:
    assert "generate" not in vars(model)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "config", model.config) is model.config


@pytest.mark.parametrize(
    "config",
    [{}, "mixtral", GenerationConfig(), types.SimpleNamespace(num_hidden_layers=2), nn.Identity()],
    ids=lambda value: type(value).__name__,
)
def test_config_that_is_none(config) -> None:
    with pytest.raises(TypeError, match=r"`config` is a \w+.*PreTrainedConfig"):
        PiKVCache(config=config)


@pytest.mark.parametrize(
    "model", ["mistralai/Mixtral-8x7B-v0.1", nn.Linear(2, 2), 3, DynamicCache(), BertConfig()]
)
def test_model_that_is_none(model) -> None:
    with pytest.raises(TypeError, match=r"`model` is a \w+.*PreTrainedModel"):
        PiKVCache(model)


def test_neither_model_nor_config() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        PiKVCache()
    with pytest.raises(ValueError, match="exactly one"):
        PiKVCache(tiny("mixtral"), config=tiny("mixtral").config)


@pytest.mark.parametrize(
    "option",
    [
        {"scheduler": "streaming_llm"},
        {"compressor": "int8"},
        {"router": "all"},
    ],
    ids=str,
)
def test_options_that_need_a_model(option) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"`{name}`.*PiKVCache\(model"):
        PiKVCache(config=tiny("mixtral").config, **option)


@pytest.mark.parametrize("registry", [COMPRESSORS, ROUTERS, SCHEDULERS, PLACEMENTS], ids=str)
def test_every_registered_name_is_accepted(registry) -> None:
    arguments = {id(COMPRESSORS): "compressor", id(ROUTERS): "router"}
    arguments |= {id(SCHEDULERS): "scheduler", id(PLACEMENTS): "placement"}
    options = {"budget": 0.5} if registry is SCHEDULERS else {}
    for name, method in registry.items():
        if getattr(method, "needs_calibration", False) or getattr(method, "needs_file", False):
            continue  # with a file: test_calibrated_cache.py, test_duo.py, test_pikv_quest.py
        if issubclass(method, Sharding):
            continue  # with several places: test_spread.py, and ranks in tests/distributed
        for value in (name, method, method()):
            PiKVCache(tiny("mixtral"), **{arguments[id(registry)]: value}, **options)


def test_a_scheduler_without_a_budget() -> None:
    with pytest.raises(ValueError, match=r"`scheduler` is SnapKV.*needs a `budget`"):
        PiKVCache(tiny("mixtral"), scheduler="snapkv")


@pytest.mark.parametrize(
    "method, wrong",
    [
        (SnapKV, {"kernel_size": 4}),
        (SnapKV, {"window_size": 0}),
        (ChunkKV, {"chunk_length": 0}),
        (ChunkKV, {"scorer": "snapkv"}),
        (PyramidKV, {"beta": 1}),
        (PyramidKV, {"scorer": None}),
        (Random, {"seed": -1}),
        (Random, {"seed": 2**63}),
    ],
    ids=str,
)
def test_options_of_schedulers(method, wrong) -> None:
    with pytest.raises((ValueError, TypeError), match=f"`{next(iter(wrong))}` is"):
        method(**wrong)


@pytest.mark.parametrize("sinks, window", [(-1, 8), (4, 0), (4, -3), (1.5, 8), ("4", 8)])
def test_streaming_llm_arguments(sinks, window) -> None:
    with pytest.raises((ValueError, TypeError), match="`sinks`|`window`"):
        StreamingLLM(sinks, window)


def test_unsupported_attention_implementation() -> None:
    model = build("mixtral")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*'sdpa', 'eager'"):
        PiKVCache(model)
    assert_untouched(model)
    model.set_attn_implementation("eager")
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(model, inputs, PiKVCache(model, **SMALL)), expected)


def test_a_router_on_a_dense_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"`router`.*gates.*LlamaForCausalLM"):
        PiKVCache(model, router="all")
    assert_untouched(model)
    ids = torch.randint(3, 60, (1, 30))
    with torch.no_grad():
        ours = model(ids, **with_cache(PiKVCache(model, **SMALL))).logits
        assert_close(ours, model(ids, **with_cache(dynamic(model))).logits)


def test_an_implementation_set_while_attached_is_refused_before_anything_is_written() -> None:
    model = build("mixtral", "sdpa")
    cache = PiKVCache(model, **SMALL)
    inputs = prompt(model, PADDED)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation='flex_attention', whose masks"):
        model(**inputs, **with_cache(cache))
    assert cache.get_seq_length() == 0
    model.set_attn_implementation("eager")
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(model, inputs, cache), expected)
