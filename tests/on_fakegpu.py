"""Run by test_placement.py in a process of its own: a model spread over logical devices.

Arguments: cases, such as mixtral:int8.
"""

import sys

import fakegpu  # first: before any model is built
import torch
from accelerate import dispatch_model
from helpers import (
    FEW_LAYERS,
    NEW_TOKENS,
    PADDED,
    SMALL,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    paged,
    slabs_of,
)
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache


def device_map(model, first, second):
    """The first half of the layers, and everything that is no layer, on `first`."""
    layers = len(model.model.layers)
    places = {f"model.layers.{i}": first if i < layers // 2 else second for i in range(layers)}
    places |= {f"model.{n}": first for n, _ in model.model.named_children() if n != "layers"}
    return places | {n: first for n, _ in model.named_children() if n != "model"}


def tokens(model, inputs, cache, **options):
    out = model.generate(**inputs, **with_cache(cache), max_new_tokens=NEW_TOKENS, **options)
    return out.cpu()


def check(name: str, method: str) -> None:
    methods = {
        "default": {},
        "int8": {"compressor": "int8"},
        "streaming": {"scheduler": "streaming_llm", "budget": 14},
    }[method]
    model = build(name, **FEW_LAYERS.get(name, {}))
    model.set_experts_implementation("eager")
    inputs = prompt(model, PADDED)
    options = {**methods, **SMALL, "router": "all"}
    expected = [
        tokens(model, inputs, PiKVCache(model, **options), num_beams=beams) for beams in (1, 2)
    ]
    if method == "default":
        assert torch.equal(expected[0], tokens(model, inputs, dynamic(model)))
    places = device_map(model, "fakegpu:0", "fakegpu:1")
    model = dispatch_model(model, places, main_device="fakegpu:0", force_hooks=True)
    inputs = {key: value.to("fakegpu:0") for key, value in inputs.items()}
    for beams, reference in zip((1, 2), expected, strict=True):
        cache = PiKVCache(model, **options)
        assert torch.equal(tokens(model, inputs, cache, num_beams=beams), reference)
        for layer in paged(cache):
            place = torch.device(places[f"model.layers.{layer.state.layer_idx}"])
            assert slabs_of(layer)
            held = [t for slab in slabs_of(layer) for t in slab.fields.values()]
            assert all(
                t.device == place for t in [layer.state.tail.keys, layer.state.tail.values, *held]
            )
            assert layer.device == place
        if method == "default":
            assert_sealed_in_prefill_and_decode(cache, max(PADDED))
    check_traffic(model, options)


def check_traffic(model, options) -> None:
    """In a decode step only hidden states cross between the devices, never keys or pages."""
    cache = PiKVCache(model, **options)
    ids = prompt(model, (60,))["input_ids"].to("fakegpu:0")
    with torch.no_grad():
        model(ids, **with_cache(cache))
        fakegpu.reset()
        model(ids[:, :1], **with_cache(cache))
    moved = fakegpu.bytes_moved("fakegpu:0", "fakegpu:1")
    assert 0 < moved < 4096, f"{moved} bytes moved to the second device in one step"


torch.set_num_threads(1)
if __name__ == "__main__":
    for case in sys.argv[1:]:
        check(*case.split(":"))
