"""A method that can act on no layer, or stops acting, is said to do so."""

import re
import warnings

import pytest
from helpers import SMALL, assert_same, dynamic, generate
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.placements import Offload

ALTERNATING = ["sliding_attention", "full_attention"] * 3
SHARED = {"num_hidden_layers": 6, "layer_types": ALTERNATING, "num_kv_shared_layers": 4}
METHODS = {"scheduler": "keydiff", "budget": 8, "compressor": "int8"}
# Models without a layer that can be paged, and what is said of their full-attention layers.
IDLE = {
    "gemma4": (SHARED, 1, "keys and values that other layers reuse"),
    "gpt_oss": ({"layer_types": ["sliding_attention"] * 4}, 0, "a sliding window"),
    "deepseek_v32": ({}, 0, "an indexer that chooses the keys"),
}
# Layers that turn out, on their first tokens, not to be ours to read.
LATE = {"jetmoe": "the model changes the keys between cache and attention"}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize(
    "methods",
    [METHODS, {"compressor": "int8"}, {"placement": Offload()}],
    ids=lambda m: "+".join(m),
)
def test_no_layer_can_be_paged(name, methods) -> None:
    fields, idx, why = IDLE[name]
    model = build(name, **fields)
    names = " and ".join(f"`{name}`" for name in methods)
    match = f"^{names} can do nothing for {type(model).__name__}: no layer.* layers: {why}"
    with pytest.warns(UserWarning, match=match) as caught:
        cache = PiKVCache(model, **methods, **SMALL)
    assert len(caught) == 1 and caught[0].filename == __file__
    inputs = prompt(model, (20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PiKVCache(model)  # without a method there is nothing to warn of
        if methods is METHODS:
            assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))
    report = cache.report()
    assert report.layers[idx].why.startswith(why)
    assert why.split(",")[0] in re.sub(r"[\s│]+", " ", str(report))


@pytest.mark.parametrize("methods", [{"router": "all"}, {"scheduler": "expert", "budget": 8}])
@pytest.mark.parametrize("name", IDLE)
def test_no_layer_to_label(name, methods) -> None:
    """The gates are there: it is the layers that are missing."""
    fields, _, why = IDLE[name]
    model = build(name, **fields)
    match = f"^`{next(iter(methods))}` is .*nothing to label: no layer.* layers: {why}"
    with pytest.raises(ValueError, match=match):
        PiKVCache(model, **methods, **{**SMALL, "window": 2})
    assert "generate" not in vars(model)


@pytest.mark.parametrize("name", LATE)
def test_no_layer_can_be_read(name) -> None:
    model = build(name)
    inputs = prompt(model, (20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cache = PiKVCache(model, **METHODS, **{**SMALL, "window": 4})
    expected = generate(model, inputs, dynamic(model))
    with pytest.warns(UserWarning, match=f"can do nothing.*4 of 4 layers: {LATE[name]}") as caught:
        assert_same(generate(model, inputs, cache), expected)
    assert len(caught) == 1
    assert {row.why for row in cache.report().layers} == {LATE[name]}


def longrope(**fields):
    """A model that gives its cache up behind 24 tokens, where it changes its rotary factors."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    scaling = {"short_mscale": 1.0, "long_mscale": 1.1, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **scaling}
    return build("phimoe", rope_parameters=rope, **fields)


@pytest.mark.parametrize("length", [20, 30])
@pytest.mark.parametrize("methods", [{}, {"compressor": "int8"}], ids=["lossless", "int8"])
def test_a_cache_that_is_given_up(length, methods) -> None:
    model = longrope()
    inputs = prompt(model, (length,))
    cache = PiKVCache(model, **methods, **SMALL)
    held = 24 if length == 20 else 0
    with pytest.warns(UserWarning, match=f"PhimoeForCausalLM goes on.* after {held} tokens"):
        model.generate(**inputs, **with_cache(cache), max_new_tokens=12)
    report = cache.report()
    assert report.seen_tokens == held and "another cache" in report.note
    assert report.note == report.to_dict()["note"] and "another cache" in str(report)
    cache.reset()
    generate(model, prompt(model, (10,)), cache, max_new_tokens=4)
    assert cache.report().note is None


@pytest.mark.parametrize("options", [{"guidance_scale": 1.5}, {"prompt_lookup_num_tokens": 2}])
def test_passes_of_another_prompt_are_no_reason_to_warn(options) -> None:
    """Guidance runs the model on a prompt of its own, with a cache of its own."""
    model = build("mixtral")
    inputs = prompt(model, (20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cache = PiKVCache(model, compressor="int8", **SMALL)
        model.generate(**inputs, **with_cache(cache), max_new_tokens=6, **options)
    assert cache.report().note is None
