"""Run by test_offload.py in a process of its own: far pages come to a logical device.

Arguments: "plain" or "streams", and cases such as mixtral:int8.
With "streams" the device has two of them. The main one works at once, the one for copies when the
main one waits for it: what is read before that, or written over while it may be read, is found.
"""

import contextlib
import sys

import fakegpu  # first: before any model is built
import torch
from accelerate import dispatch_model
from helpers import FEW_LAYERS, NEW_TOKENS, PADDED, SMALL, Scattered, paged, slabs_of
from torch.utils._pytree import tree_leaves
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.placements import Offload
from pikv_hf.storage import prefetch as staging

DEVICE = torch.device("fakegpu:0")
# Options of a cache, and bytes near, of all layers.
METHODS = {
    "default": ({}, 8000),
    "int8": ({"compressor": "int8"}, 4000),
    "mixed": ({"compressor": Scattered()}, 8000),
    "codes": ({"scheduler": "streaming_llm", "budget": 14, "compressor": "int8"}, 2000),
    "snapkv": ({"scheduler": "snapkv", "budget": 14}, 8000),
}
run = fakegpu.run


class Streams:
    """The two streams of the device, and what is known of each piece of memory."""

    def __init__(self) -> None:
        self.main, self.side = Stream(self), Stream(self)
        self.clock = 0  # operators of the main stream
        self.used: dict[int, int] = {}  # memory -> when the main stream used it last
        self.is_side = False
        self.copied = 0

    def run(self, func, args, kwargs):
        """In the place of `fakegpu.run`."""
        memory = [pointer(t) for t in fake_tensors((args, kwargs))]
        if self.is_side and func.__name__ == "copy_.default":
            late = self.used.get(memory[0], 0) > self.side.synced
            assert not late, "memory is written over that the main stream may still read"
            self.side.work.append((memory[0], lambda: run(func, args, kwargs)))
            self.copied += 1
            return args[0]
        out = run(func, args, kwargs)
        made = [pointer(t) for t in fake_tensors(out)]
        is_view = made and set(made) <= set(memory) and not func._schema.is_mutable
        if not is_view:
            self.clock += 1
            coming = {pointer for pointer, _ in self.side.work}
            assert not coming & {*memory, *made}, "read before the copy was waited for"
            self.used.update(dict.fromkeys([*memory, *made], self.clock))
        return out

    @contextlib.contextmanager
    def within(self, stream):
        self.is_side = stream is self.side
        yield
        self.is_side = False


def fake_tensors(value) -> list[fakegpu.FakeGpuTensor]:
    leaves = [value] if isinstance(value, torch.Tensor) else tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, fakegpu.FakeGpuTensor)]


def pointer(tensor) -> int:
    return tensor.inner.untyped_storage().data_ptr()


class Stream:
    def __init__(self, streams) -> None:
        self.device, self.streams = DEVICE, streams
        self.work, self.done = [], 0  # copies to come, and how many are done
        self.synced = 0  # of the main stream's work, what was done before

    def wait_event(self, event) -> None:
        if self is self.streams.main:
            self.streams.side.finish(event.side)
        else:
            self.synced = max(self.synced, event.main)

    def wait_stream(self, other) -> None:
        event = Event(self.streams)
        event.record(other)
        self.wait_event(event)

    def finish(self, until) -> None:
        while self.done < until:
            self.work.pop(0)[1]()
            self.done += 1


class Event:
    def __init__(self, streams) -> None:
        self.streams, self.main, self.side = streams, 0, 0

    def record(self, stream) -> None:
        if stream is self.streams.main:
            self.main = self.streams.clock
        else:
            self.side = stream.done + len(stream.work)


def with_streams() -> Streams:
    streams, backend = Streams(), fakegpu.BACKEND
    fakegpu.run = streams.run
    backend.Stream, backend.stream = lambda device: streams.side, streams.within
    backend.Event = lambda: Event(streams)
    backend.current_stream = lambda device: streams.main
    return streams


def generate(model, inputs, cache, beams):
    options = {"max_new_tokens": NEW_TOKENS, "num_beams": beams}
    return model.generate(**inputs, **with_cache(cache), **options).cpu()


def check(name: str, method: str, streams: Streams | None) -> None:
    model = build(name, **FEW_LAYERS.get(name, {}))
    model.set_experts_implementation("eager")
    methods, limit = METHODS[method]
    inputs, options = prompt(model, PADDED), {**methods, **SMALL}
    expected = [generate(model, inputs, PiKVCache(model, **options), n) for n in (1, 2)]
    places = {module: "fakegpu:0" for module, _ in model.named_children()}
    model = dispatch_model(model, places, main_device="fakegpu:0", force_hooks=True)
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    for beams, reference in zip((1, 2), expected, strict=True):
        cache = PiKVCache(model, placement=Offload(limit), **options)
        assert torch.equal(generate(model, inputs, cache, beams), reference)
        layers = paged(cache)
        slabs = [slab for layer in layers for slab in slabs_of(layer)]
        assert {slab.tier.name for slab in slabs} == {"device", "ram"}
        for slab in slabs:
            place = "cpu" if slab.tier.name == "ram" else "fakegpu"
            assert {t.device.type for t in slab.fields.values()} == {place}
            assert slab.tier.device == DEVICE
        near = sum(slab.nbytes for slab in slabs if slab.tier.name == "device")
        assert 0 < near <= limit
    if streams is not None:
        assert streams.copied > 100, "of this model"
        streams.copied = 0


def main(way: str, *cases: str) -> None:
    torch.set_num_threads(1)
    staging.BLOCK_BYTES = 600  # a page or two
    streams = with_streams() if way == "streams" else None
    for case in cases:
        check(*case.split(":"), streams)


main(*sys.argv[1:])
