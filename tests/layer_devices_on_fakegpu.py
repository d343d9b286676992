"""Run by test_devices.py in a process of its own: where layers run on logical devices.

Models are dispatched by hand, and as `infer_kv_device_map` plans them.
"""

import fakegpu  # first: before any model is built
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from on_fakegpu import device_map
from transformers import DynamicCache
from zoo import build, prompt

from pikv_hf import infer_kv_device_map
from pikv_hf.model.devices import layer_devices
from pikv_hf.model.modules import attention_modules
from pikv_hf.model.versions import with_cache
from pikv_hf.placements.kv_device_map import device_of_layers


def spread(model):
    return dispatch_model(model, device_map(model, "fakegpu:1", "fakegpu:2"), force_hooks=True)


def numbered(model):
    return dispatch_model(model, device_map(model, 1, 3), force_hooks=True)


def offloaded_in_part(model):
    """The second half of the layers is offloaded, and runs on the main device."""
    places = device_map(model, "fakegpu:3", "cpu")
    return dispatch_model(model, places, main_device="fakegpu:3", force_hooks=True)


def offloaded(model):
    return cpu_offload(model, torch.device("fakegpu:2"))


def offloaded_and_hooked_twice(model):
    model = offloaded(model)
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(module, AlignDevicesHook(), append=True)
    return model


def moved(model):
    return model.to("fakegpu:1")


def check(name, how) -> None:
    model = build(name)
    model.set_experts_implementation("eager")
    model = how(model)
    cache = DynamicCache(config=model.config)
    ids = prompt(model, (12,))["input_ids"].to("fakegpu:1")
    with torch.no_grad():
        model(ids, **with_cache(cache))
    attention = attention_modules(model)
    found = layer_devices(attention, model)
    assert found == {layer: cache.layers[layer].keys.device for layer in attention}, how.__name__


assert fakegpu.DEVICE_COUNT == 4
for name in ("mixtral", "deepseek_v3", "gpt_oss"):
    for how in (
        spread,
        numbered,
        offloaded_in_part,
        offloaded,
        offloaded_and_hooked_twice,
        moved,
    ):
        check(name, how)


def check_plan(name) -> None:
    """Layers of a planned model run where its `kv_device_map` says."""
    model = build(name)
    layers = range(model.config.num_hidden_layers)
    size = sum(weight.nbytes for weight in model.parameters())
    memory = {0: size, 1: size, 3: size}
    device_map, kv_device_map = infer_kv_device_map(model, memory, max_cache_len=500)
    named = device_of_layers(kv_device_map, layers, dict.fromkeys(layers))
    model = dispatch_model(model, device_map, force_hooks=True)
    attention = attention_modules(model)
    found = layer_devices(attention, model)
    assert found == {layer: named[layer].device for layer in attention}
    assert len({devices.device for devices in named.values()}) == 3


for name in ("mixtral", "deepseek_v3", "gpt_oss"):
    check_plan(name)
