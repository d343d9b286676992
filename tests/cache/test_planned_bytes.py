"""Bytes that are planned without weights, beside the bytes that real caches hold."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrations import made
from helpers import tiny
from test_duo import profile_of
from transformers import PreTrainedModel
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.planned_bytes import planned_bytes
from pikv_hf.compressors import LowRank
from pikv_hf.model.versions import with_cache
from pikv_hf.model.without_weights import without_weights
from pikv_hf.schedulers import Duo
from pikv_hf.storage.tiers import Near

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")
SMALL = {"page_size": 16, "window": 32}


def held(model: PreTrainedModel, length: int, rows: int, **settings: Any) -> PiKVCache:
    """A cache after a prefill of `length` tokens in each of `rows` rows."""
    cache = PiKVCache(model, **settings)
    with torch.no_grad():
        model(prompt(model, (length,) * rows)["input_ids"], **with_cache(cache))
    cache.detach()
    return cache


def planned(model: PreTrainedModel, length: int, rows: int, **settings: Any) -> int:
    plan = planned_bytes(model, length, rows, **settings)
    assert list(plan.layers) == list(range(len(plan.layers)))
    return sum(plan.layers.values()) + plan.ids


# A plan is exact if the number of tokens is known and pages have one size.
EXACT = [
    {},
    {"compressor": "int4"},
    {"compressor": "int8", "window": 100, "page_size": 64},
    {"scheduler": "snapkv", "budget": 128},
    {"scheduler": "snapkv", "budget": 0.25, "compressor": "int4"},
    {"scheduler": "keydiff", "budget": {"prefill": 96}, "sinks": 8},
    {"scheduler": "expert", "budget": 0.5},
    {"scheduler": "pyramidkv", "budget": 0.4},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", EXACT, ids=str)
def test_plan_is_what_a_cache_holds(family, settings):
    model, settings = tiny(family), {**SMALL, **settings}
    length, rows = random.randint(300, 700), random.choice([1, 2, 3])
    assert planned(model, length, rows, **settings) == held(model, length, rows, **settings).nbytes


# Bounds on counts that a plan makes: records while they are counted, a router's lists, pages of
# which each KV head has a partial one, or that differ in their encoding.
NEAR = [
    ({"scheduler": "h2o", "budget": 0.5}, 0.05),
    ({"scheduler": "adakv", "budget": 0.3}, 0.05),
    ({"scheduler": "fastv", "budget": 0.4}, 0.05),
    ({"router": "quest"}, 0.05),
    ({"compressor": "pyramid"}, 0.08),
]


@pytest.mark.parametrize(("settings", "bound"), NEAR, ids=str)
def test_plan_of_ragged_pages_and_lists_is_near(settings, bound):
    model, settings = tiny("mixtral"), {**SMALL, **settings}
    length, rows = random.randint(300, 700), random.choice([1, 2])
    expected = held(model, length, rows, **settings).nbytes
    assert planned(model, length, rows, **settings) == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next"])
def test_budget_in_bytes_is_the_limit(family):
    fields = {"sliding_window": 200} if family == "gpt_oss" else {}
    model, settings = tiny(family, **fields), {**SMALL, "scheduler": "keydiff", "budget": "300KB"}
    nbytes = planned(model, 900, 1, **settings)
    assert nbytes <= 300_000
    assert nbytes == pytest.approx(held(model, 900, 1, **settings).nbytes, rel=0.05)


def test_budget_in_bytes_that_other_layers_exceed_is_refused():
    model = tiny("gpt_oss", sliding_window=400)
    with pytest.raises(ValueError, match="`budget` is 150000 bytes, of which layers that are not"):
        planned_bytes(model, 900, 1, **SMALL, scheduler="keydiff", budget="150KB")


def test_calibrated_weights_count(tmp_path):
    model = build("mixtral", "sdpa")
    settings = {**SMALL, "compressor": LowRank(calibration=made(model, tmp_path))}
    assert planned(model, 500, 2, **settings) == held(model, 500, 2, **settings).nbytes


def test_heads_with_lengths_of_their_own_count(tmp_path):
    model = tiny("mixtral", num_hidden_layers=2)
    duo = Duo(profile=profile_of(model, tmp_path / "duo.safetensors"), sinks=8, recent=40)
    settings = {**SMALL, "scheduler": duo}
    expected = held(model, 600, 2, **settings).nbytes
    assert planned(model, 600, 2, **settings) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("scheduler", ["snapkv", "kvzip"])
def test_held_prompt_counts_whole(scheduler):
    model = tiny("mixtral")
    settings = {**SMALL, "scheduler": scheduler, "budget": 0.25, "hold_prompt": True}
    expected = planned(model, 400, 2, **settings)
    cache = PiKVCache(model, **settings)
    with torch.no_grad(), cache.reading.prompt(400):
        model(prompt(model, (400, 400))["input_ids"], **with_cache(cache))
    assert cache.nbytes == pytest.approx(expected, rel=0.01)
    cache.detach()


def test_pages_in_other_memory_do_not_count():
    model, settings = tiny("mixtral"), {**SMALL, "placement": "offload"}
    cache = held(model, 500, 1, **settings)
    far = sum(
        slab.nbytes for s in cache.states for slab in s.pages.slabs if slab.tier.name != Near.name
    )
    assert far and planned(model, 500, 1, **settings) == cache.nbytes - far


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_and_dtype_of_the_model_count(family):
    model = build(family, dtype=torch.bfloat16)
    few, many = (planned_bytes(model, 4096, rows).layers for rows in (1, 4))
    wide = planned_bytes(tiny(family), 4096, 1).layers
    for layer, nbytes in few.items():
        if nbytes > 2**18:  # states of linear attention are float32
            assert many[layer] == pytest.approx(4 * nbytes, rel=0.04)  # rows share positions
            assert wide[layer] == pytest.approx(2 * nbytes, rel=0.04)  # positions are as wide


def test_model_is_left_as_it_is():
    model = build("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, hooks = model.config.to_dict(), len(model.model._forward_hooks)
    planned_bytes(model, 300, scheduler="snapkv", budget=0.5)
    assert model.config.to_dict() == config and len(model.model._forward_hooks) == hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_wrong_settings_are_refused_as_by_the_cache():
    model = tiny("mixtral")
    settings = {"compressor": "int5"}
    cases: list[Callable[[], Any]] = [
        lambda: PiKVCache(model, **settings),
        lambda: planned_bytes(model, 300, **settings),
    ]
    messages = []
    for case in cases:
        with pytest.raises(ValueError, match="`compressor` is 'int5'") as error:
            case()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_model_that_needs_values_is_refused_by_name():
    with pytest.raises(
        ValueError, match="JetMoeForCausalLM, whose forward pass does not run without"
    ):
        planned_bytes(tiny("jetmoe"), 300)


def test_copy_without_weights_has_the_shapes_and_dtypes_of_the_model():
    model = tiny("deepseek_v3")
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    copied = without_weights(model).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in copied.items()} == shapes
    assert all(tensor.is_meta for tensor in copied.values())
