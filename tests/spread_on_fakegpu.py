"""Run by test_spread.py in a process of its own: pages spread over logical devices and the CPU.

Arguments: cases, such as mixtral:int8.
"""

import sys

import fakegpu  # first: before any model is built
import torch
from accelerate import dispatch_model
from helpers import FEW_LAYERS, NEW_TOKENS, PADDED, SMALL, paged
from on_fakegpu import device_map
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.placements import DeviceMap, Experts, Offload, Spread

DEVICES = ("fakegpu:0", "fakegpu:1", "fakegpu:2", "cpu")
METHODS = {
    "lossless": {},
    "int8": {"compressor": "int8"},
    "turboquant": {"compressor": "turboquant"},
    "streaming": {"scheduler": "streaming_llm", "budget": 14},
    "h2o": {"scheduler": "h2o", "budget": 14},
    "adakv": {"scheduler": "adakv", "budget": 14},
    "adakv_int4": {"scheduler": "adakv", "budget": 14, "compressor": "int4"},
    "quest": {"router": "quest"},
    "probed": {"router": "quest", "probe": True},
}
OPTIONS = [{}, {"num_beams": 2}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 2}]


def tokens(model, inputs, cache, **options):
    out = model.generate(**inputs, **with_cache(cache), max_new_tokens=NEW_TOKENS, **options)
    return out.cpu()


def check(name: str, method: str, placement) -> None:
    model = build(name, **FEW_LAYERS.get(name, {}))
    model.set_experts_implementation("eager")
    options = {**METHODS[method], **SMALL}
    every = []
    for mode in OPTIONS:
        inputs = prompt(model, PADDED if "prompt_lookup_num_tokens" not in mode else PADDED[-1:])
        cache = PiKVCache(model, **options)
        every.append((mode, inputs, tokens(model, inputs, cache, **mode)))
    places = device_map(model, "fakegpu:0", "fakegpu:1")
    model = dispatch_model(model, places, main_device="fakegpu:0", force_hooks=True)
    for mode, inputs, expected in every:
        inputs = {key: value.to("fakegpu:0") for key, value in inputs.items()}
        cache = PiKVCache(model, placement=placement, **options)
        assert torch.equal(tokens(model, inputs, cache, **mode), expected), mode
        for layer in paged(cache):
            pages = layer.state.pages
            counts = [sum(s.page_count for s in pages.of_place(p)) for p in range(pages.places.count)]
            devices = {str(t.device) for s in pages.slabs for t in s.fields.values()}
            print(name, method, mode, counts, devices, dict(layer.state.sent))


if __name__ == "__main__":
    PLACEMENTS = {
        "spread": Spread(devices=DEVICES),
        "two": Spread(),
        "experts": Experts(devices=DEVICES),
        "layers": DeviceMap(kv_device_map={"layers.0": "fakegpu:2", "": "cpu"}),
        "map": DeviceMap(
            kv_device_map={"": "fakegpu:2", "layers.0.experts.0-2": "cpu", "layers.1": "fakegpu:0"},
            max_memory={"cpu": 3000},
        ),
        "offload": Spread(devices=DEVICES[:2], offload=Offload(device_bytes=2000)),
    }
    for case in sys.argv[1:]:
        name, method, placement = case.split(":")
        check(name, method, PLACEMENTS[placement])
