"""A `generate` that another library put on the model is called while attached, and stays."""

import copy
import functools
import gc
import inspect
import weakref

import pytest
import torch
from helpers import PADDED, SMALL, assert_same, dynamic, generate
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache


def put_generate(model, calls: list[str], name: str):
    """Wrap `model.generate` on the instance, as unsloth and others do."""
    original = model.generate

    @functools.wraps(original)
    def generate(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    model.generate = generate
    return generate


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_put_before_attaching(name) -> None:
    model = build(name)
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model), max_new_tokens=4)
    calls: list[str] = []
    own = put_generate(model, calls, "own")
    with PiKVCache(model, **SMALL) as cache:
        assert_same(generate(model, inputs, cache, max_new_tokens=4), expected)
        assert calls == ["own"]
        with pytest.raises(ValueError, match="does not begin with"):
            model.generate(torch.ones(3, 60).long(), **with_cache(cache))
        assert calls == ["own"]
        assert inspect.signature(model.generate) == inspect.signature(own)
        assert vars(copy.deepcopy(model))["generate"] is own
    assert model.generate is own


def test_put_while_attached() -> None:
    """It stays, and calls what it found; a next cache wraps it in turn."""
    model = build("mixtral")
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model), max_new_tokens=4)
    calls: list[str] = []
    first = PiKVCache(model, **SMALL)
    own = put_generate(model, calls, "own")
    assert_same(generate(model, inputs, first, max_new_tokens=4), expected)
    assert vars(copy.deepcopy(model))["generate"] is own
    first.detach()
    assert model.generate is own
    assert_same(generate(model, inputs, dynamic(model), max_new_tokens=4), expected)
    with PiKVCache(model, **SMALL) as second:
        assert_same(generate(model, inputs, second, max_new_tokens=4), expected)
    assert calls == ["own"] * 3 and model.generate is own


def test_the_model_is_not_kept_alive_by_it() -> None:
    model = build("mixtral")
    put_generate(model, [], "own")
    cache = PiKVCache(model, **SMALL)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None and cache.model is None
