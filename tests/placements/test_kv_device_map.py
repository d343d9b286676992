"""Keys of `kv_device_map`: which layer and which expert gets which device."""

import random
import re

import pytest
import torch
from test_placement import run_on_fakegpu

from pikv_hf.placements.kv_device_map import LayerDevices, device_of_layers

CPU = torch.device("cpu")
DENSE = dict.fromkeys(range(4))
EXPERTS = dict.fromkeys(range(4), 8)


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model."])
@pytest.mark.parametrize("key", ["layers", "layers.0-3"])
def test_layers_have_the_device_of_their_key(prefix, key):
    found = device_of_layers({prefix + key: "cpu"}, [0, 2], DENSE)
    assert found == {0: LayerDevices(CPU, None), 2: LayerDevices(CPU, None)}


def test_experts_have_devices_if_a_key_names_any():
    given = {
        "": "cpu",
        "layers.1.experts.3-4": torch.device("cpu"),
        "layers.2.mlp.experts.7": "cpu",
    }
    found = device_of_layers(given, range(4), EXPERTS)
    assert [layer.of_experts for layer in found.values()] == [None, (CPU,) * 8, (CPU,) * 8, None]


def test_a_hybrid_model_is_asked_about_some_of_its_layers():
    assert list(device_of_layers({"layers.0-3": "cpu"}, [1, 3], DENSE)) == [1, 3]


def test_the_most_specific_key_counts_on_several_devices():
    """Beside a plain search, in a process that has several devices."""
    run_on_fakegpu("kv_device_map_on_fakegpu.py", str(random.randrange(10**6)))


@pytest.mark.parametrize(
    "key", ["layer.0", "layers.0-", "layers.x", "layers.0.mlp", "layers.0.experts", "lm_head", 3]
)
def test_a_key_that_is_not_understood_is_refused(key):
    with pytest.raises(ValueError, match=re.escape(f"key {key!r}; a key must be ''")):
        device_of_layers({"": "cpu", key: "cpu"}, [0], EXPERTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers.3-1": "cpu"}, "key 'layers.3-1', whose range ends before it begins"),
        ({"layers.1-2": "cpu"}, "no device to the layers [0, 3]: add keys"),
        ({"layers.1.experts.0-7": "cpu"}, "no device to the layers [0, 1, 2, 3]"),
        ({}, "has the keys [], which give no device to the layers [0, 1, 2, 3]"),
        ({"": "cpu", "layers.2-4": "cpu"}, "the layers of the model are 0-3."),
        ({"": "cpu", "layers.9": "cpu"}, "the layers of the model are 0-3."),
        ({"": "cpu", "layers.1.experts.8": "cpu"}, "the experts of layer 1 are 0 to 7."),
        ({"": "disk"}, "is 'disk'; pages are kept on disk by `placement=Offload("),
        ({"": "cuda:99"}, "`kv_device_map['']` is 'cuda:99'; it must be a device that is here"),
        ({"": "meta"}, "is 'meta'; it must be a device that is here"),
        ({"": "gpu"}, "is 'gpu'; it must be a device that is here"),
        ({"": 99}, "is 99; it must be a device that is here"),
        ({"": True}, "is True; it must be a device that is here"),
        ({"": None}, "is None; it must be a device that is here"),
    ],
)
def test_a_map_that_cannot_be_kept_is_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        device_of_layers(given, range(4), EXPERTS)


def test_experts_of_a_layer_without_experts_are_refused():
    given = {"": "cpu", "layers.0-1.experts.0": "cpu"}
    with pytest.raises(ValueError, match=r"layers.0-1.experts.0', but layer 1 has no experts."):
        device_of_layers(given, [0, 1], {0: 8, 1: None})


def test_only_a_mapping_is_a_map():
    with pytest.raises(TypeError, match="`kv_device_map` is a str; it must be a mapping"):
        device_of_layers("cpu", [0], DENSE)  # ty: ignore[invalid-argument-type]
