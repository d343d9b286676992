"""Copies and pickles of a model to which caches are attached are of the plain model."""

import copy
import io
import pickle

import pytest
import torch
from helpers import FAMILIES, PADDED, SMALL, assert_same, dynamic, generate
from test_attach import fingerprint
from zoo import build, prompt

from pikv_hf import PiKVCache

WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def changeable(model):
    """What of a model does not depend on which object it is: hooks, attributes, configs."""
    modules, _, configs, generation = fingerprint(model)
    kept = {
        name: (kind, {k: v if "hooks" in k else None for k, v in attributes.items()}, forward)
        for name, (kind, attributes, forward) in modules.items()
    }
    return kept, configs, generation


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_nothing_of_us(name, way) -> None:
    model = build(name)
    before = changeable(model)
    cache = PiKVCache(model, router="all", **SMALL)
    attached = fingerprint(model)
    twin = WAYS[way](model)
    assert fingerprint(model) == attached
    assert changeable(twin) == before
    configs = {id(module.config) for module in twin.modules() if hasattr(module, "config")}
    plain = build(name)
    assert len(configs) == len({id(m.config) for m in plain.modules() if hasattr(m, "config")})
    cache.detach()
    assert changeable(model) == before == changeable(twin)


def test_a_model_inside_another_module_is_copied() -> None:
    model = build("mixtral")
    wrapped = torch.nn.ModuleDict({"model": model})
    before = changeable(model)
    cache = PiKVCache(model, router="all", **SMALL)
    assert changeable(copy.deepcopy(wrapped)["model"]) == before
    del cache


def test_a_decoder_of_two_models() -> None:
    """Caches of the decoder alone are refused while its model has some: no pass would be theirs."""
    model = build("mixtral")
    before = fingerprint(model)
    cache = PiKVCache(model, **SMALL)
    with pytest.raises(ValueError, match="caches of another model"):
        PiKVCache(model.model)
    inputs = prompt(model, PADDED)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))
    cache.detach()
    assert fingerprint(model) == before
    PiKVCache(model.model).detach()
    assert fingerprint(model) == before
