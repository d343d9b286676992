"""Run by test_spread.py in a process of its own: pages dealt to logical devices and to the CPU.

Arguments: cases, such as mixtral:int8:spread, or traffic.
"""

import sys

import fakegpu  # first: before any model is built
import torch
from accelerate import dispatch_model
from helpers import NEW_TOKENS, ONE_ROW, PADDED, SMALL, paged
from on_fakegpu import device_map
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.place_report import PlaceReport
from pikv_hf.model.versions import with_cache
from pikv_hf.placements import DeviceMap, Experts, Offload, PiKVXor, Spread

DEVICES = ("fakegpu:0", "fakegpu:1", "fakegpu:2", "cpu")
PLACEMENTS = {
    "spread": Spread(devices=DEVICES),
    "model": Spread(),  # the two devices that it runs on
    "experts": Experts(devices=DEVICES),
    "pikv_xor": PiKVXor(devices=DEVICES),
    "offload": Spread(devices=DEVICES[:2], offload=Offload(device_bytes=4000)),
    "layers": DeviceMap(kv_device_map={"layers.0": "fakegpu:2", "": "cpu"}),
    "map": DeviceMap(
        kv_device_map={"": "fakegpu:2", "layers.0.experts.0-2": "cpu", "layers.1": "fakegpu:0"},
        max_memory={"cpu": 3000},
    ),
}
METHODS = {
    "lossless": {},
    "int8": {"compressor": "int8"},
    "h2o": {"scheduler": "h2o", "budget": 14},
    "adakv_int4": {"scheduler": "adakv", "budget": 14, "compressor": "int4"},
    "hash": {"router": "hash"},
    "quest": {"router": "quest", "probe": True},
}
# As few as divide: gpt-oss alternates sliding and full attention.
LAYERS = {"gpt_oss": 4}
MODES = ({}, {"num_beams": 2}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 2})


def tokens(model, inputs, cache, **options):
    out = model.generate(**inputs, **with_cache(cache), max_new_tokens=NEW_TOKENS, **options)
    return out.cpu()


def dispatched(model):
    places = device_map(model, "fakegpu:0", "fakegpu:1")
    return dispatch_model(model, places, main_device="fakegpu:0", force_hooks=True)


def check(name: str, method: str, placement: str) -> None:
    model = build(name, num_hidden_layers=LAYERS.get(name, 2))
    model.set_experts_implementation("eager")
    options = {**METHODS[method], **SMALL}
    expected = []
    for mode in MODES:
        lengths = ONE_ROW if "prompt_lookup_num_tokens" in mode else PADDED
        inputs = prompt(model, lengths)
        expected.append((inputs, tokens(model, inputs, PiKVCache(model, **options), **mode)))
    model = dispatched(model)
    for mode, (inputs, reference) in zip(MODES, expected, strict=True):
        inputs = {key: value.to("fakegpu:0") for key, value in inputs.items()}
        cache = PiKVCache(model, placement=PLACEMENTS[placement], **options)
        assert torch.equal(tokens(model, inputs, cache, **mode), reference), mode
        places = PlaceReport.of(cache.states)
        stores = [slab for layer in paged(cache) for slab in layer.state.pages.slabs]
        assert sum(place.pages for place in places) == sum(store.page_count for store in stores)
        assert {place.device for place in places} <= set(DEVICES)
        for layer in paged(cache):
            held = {str(t.device) for slab in layer.state.pages.slabs for t in slab.fields.values()}
            if placement == "layers":
                assert held == {"fakegpu:2" if layer.state.layer_idx == 0 else "cpu"}
            elif placement == "model":
                assert held == {"fakegpu:0", "fakegpu:1"}


def sent(cache) -> int:
    return sum(place.bytes_sent for place in PlaceReport.of(cache.states))


def check_traffic() -> None:
    """A step moves queries, outputs and log-sum-exps, whatever the length; never keys or values."""
    model = build("mixtral")
    model.set_experts_implementation("eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    dim = model.config.head_dim
    model = dispatched(model)
    moved = []
    for length in (256, 1024):
        cache = PiKVCache(model, placement=PLACEMENTS["spread"], **SMALL)
        with torch.no_grad():
            ids = prompt(model, (length,))["input_ids"].to("fakegpu:0")
            model(ids, **with_cache(cache))
            model(ids[:, :1], **with_cache(cache))  # index tensors are uploaded once
            before = sent(cache)
            fakegpu.reset()
            model(ids[:, :1], **with_cache(cache))
        counted = sent(cache) - before
        others = len(DEVICES) - 1
        assert counted == layers * others * heads * (4 * dim + 4 * dim + 4)
        hidden = 4 * model.config.hidden_size  # crosses once to the second half of the layers
        total = fakegpu.bytes_moved() - hidden
        assert counted <= total <= 1.1 * counted, (counted, total)
        moved.append(total)
    assert moved[0] == moved[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        if case == "traffic":
            check_traffic()
        else:
            check(*case.split(":"))
