"""A forward pass, or sealing, that fails half-way: taken back, or the cache is refused until reset."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    SMALL,
    assert_close,
    assert_same,
    chunks,
    dynamic,
    forward,
    generate,
    padded_prompt,
    paged,
    rows_of,
    sealed,
    slabs_of,
    spans_of,
    tiny,
)
from torch import Tensor, nn

import pikv_hf
from pikv_hf import PiKVCache

SOURCE = str(Path(pikv_hf.__file__).parent)
ROOMY = {"page_size": 4, "window": 20}  # of 29 tokens, 8 are sealed; 3 more fit in
SETTINGS: list[dict[str, Any]] = [
    {},
    {"compressor": "int8", "router": "all"},
    {"scheduler": "snapkv", "budget": 40},
    {"scheduler": "h2o", "budget": 40},
]


class OutOfMemory(RuntimeError):
    pass


@contextmanager
def failing(module: nn.Module, error: BaseException, *, behind: bool = False) -> Iterator[None]:
    """Within the block `module` raises `error`, before it runs or behind it."""

    def hook(*_: Any) -> None:
        raise error

    register = module.register_forward_hook if behind else module.register_forward_pre_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def places(model: Any) -> list[nn.Module]:
    """In the middle of the first layer and of the last one, and behind them all."""
    decoder = model.model
    return [decoder.layers[0].mlp, decoder.layers[-1].self_attn, decoder.norm]


@pytest.fixture(
    params=SETTINGS, ids=lambda kw: kw.get("scheduler") or kw.get("compressor", "lossless")
)
def read(request, name):
    """A model, left-padded rows, and two caches of 29 tokens of them."""
    model = tiny(name)
    ids, mask = padded_prompt(model, (36, 32))
    caches = [PiKVCache(model, **request.param, **ROOMY) for _ in range(2)]
    for cache in caches:
        for start, end in ((0, 28), (28, 29)):
            forward(model, ids[:, start:end], mask[:, :end], cache)
        assert all(slabs_of(layer) for layer in paged(cache))
    return model, ids, mask, caches


def fail(model, ids, mask, cache, start, end, place, error) -> None:
    with pytest.raises(type(error)), failing(place, error):
        forward(model, ids[:, start:end], mask[:, :end], cache)


def assert_refused(model, ids, mask, cache, match: str) -> None:
    """Every use, and nothing is changed by it."""
    uses = [
        lambda: forward(model, ids[:, 30:31], mask[:, :31], cache),
        lambda: generate(model, {"input_ids": ids, "attention_mask": mask}, cache),
        lambda: forward(model, ids[:, 30:31], mask[:, :31], copy.deepcopy(cache)),
        cache.compress,
        cache.fork,
        lambda: list(cache),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=match):
            use()
    assert cache.nbytes and str(cache.report())


# qwen3_next has linear attention, gpt_oss windows: what they forget cannot be taken back
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_failed_pass_is_taken_back(read) -> None:
    model, ids, mask, (cache, untouched) = read
    states = [(layer.state.num_departed, sealed_of(layer)) for layer in paged(cache)]
    for place, length in zip(places(model), (1, 2, 1), strict=True):
        error = OutOfMemory() if length == 1 else KeyboardInterrupt()
        fail(model, ids, mask, cache, 29, 29 + length, place, error)
        cache.crop(-length)
        assert {layer.state.num_seen for layer in paged(cache)} == {29} == {cache.log.length}
    assert states == [(layer.state.num_departed, sealed_of(layer)) for layer in paged(cache)]
    for start, end in ((29, 30), (30, 35), (35, 36)):
        both = [forward(model, ids[:, start:end], mask[:, :end], c) for c in (cache, untouched)]
        assert_close(*both)
    for mine, other in zip(paged(cache), paged(untouched), strict=True):
        assert mine.state.num_departed == other.state.num_departed
        assert sealed_of(mine) == sealed_of(other)


def sealed_of(layer) -> list[list[list[int]]]:
    """Positions of the sealed tokens, by row and KV head."""
    spans = (spans_of(layer, [row]) for row in range(rows_of(layer)))
    return [[span["positions"].flatten().tolist() for span in row] for row in spans]


@pytest.mark.parametrize("name", ["mixtral"])
def test_until_then_it_is_refused(read) -> None:
    model, ids, mask, (cache, _) = read
    fail(model, ids, mask, cache, 29, 31, places(model)[0], OutOfMemory())
    assert_refused(model, ids, mask, cache, r"of 2 tokens, has failed.*`cache.crop\(-2\)`.*reset")
    for count in (0, -1, 1):
        with pytest.raises(ValueError, match="2 tokens must go: it must be -2 or less"):
            cache.crop(count)
    if cache.settings.scheduler is None:
        cache.crop(-2 - 24)  # into pages
        assert {layer.state.num_seen for layer in paged(cache)} == {5}
        again = dynamic(model)
        forward(model, ids[:, :5], mask[:, :5], again)
        both = [forward(model, ids[:, 5:9], mask[:, :9], c) for c in (cache, again)]
        if cache.settings.compressor.is_lossless:
            assert_close(*both)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_sealed_is_not_taken_back(name) -> None:
    model = tiny(name)
    ids, mask = padded_prompt(model, (36, 33))
    cache = PiKVCache(model, **SMALL)
    forward(model, ids[:, :30], mask[:, :30], cache)
    fail(model, ids, mask, cache, 30, 36, model.model.layers[-1].mlp, OutOfMemory())
    assert_refused(model, ids, mask, cache, r"of 6 tokens, has failed.*: call `cache\.reset")
    with pytest.raises(RuntimeError, match=r"call `cache\.reset"):
        cache.crop(-6)
    cache.reset()
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
def test_layers_that_are_not_ours(name) -> None:
    """Windows that have not moved yet can be taken back; states cannot."""
    model = tiny(name)
    ids, mask = padded_prompt(model, (12, 12))
    cache, untouched = PiKVCache(model), PiKVCache(model)
    for one in (cache, untouched):
        forward(model, ids[:, :4], mask[:, :4], one)
    for layer in model.model.layers:
        fail(model, ids, mask, cache, 4, 6, layer.mlp, OutOfMemory())
        if name == "qwen3_next":
            with pytest.raises(RuntimeError, match=r"call `cache\.reset"):
                cache.crop(-2)
            return
        cache.crop(-2)
    for start, end in ((4, 6), (6, 7), (7, 12)):
        assert_close(
            *(forward(model, ids[:, start:end], mask[:, :end], c) for c in (cache, untouched))
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_before_anything_is_written_nothing_has_happened(name) -> None:
    model = tiny(name)
    ids, mask = padded_prompt(model, (24, 20))
    caches = PiKVCache(model, **SMALL), dynamic(model)
    for cache in caches:
        forward(model, ids[:, :20], mask[:, :20], cache)
    fail(model, ids, mask, caches[0], 20, 24, model.model.layers[0], OutOfMemory())
    assert_close(*(forward(model, ids[:, 20:], mask, cache) for cache in caches))


def test_the_first_pass_can_be_cropped() -> None:
    model = tiny("mixtral")
    ids, mask = padded_prompt(model, (24, 20))
    cache = PiKVCache(model, **SMALL)
    fail(model, ids, mask, cache, 0, 24, model.model.layers[-1].mlp, OutOfMemory())
    cache.crop(-24)
    assert_close(forward(model, ids, mask, cache), forward(model, ids, mask, dynamic(model)))


# ---- interrupted anywhere -----------------------------------------------------------------------


class Interrupt:
    """Ctrl-C at line number `at`, counted among the lines of pikv_hf that run."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def step(model, ids: Tensor, mask: Tensor, cache, at: int) -> int:
    """The last of `ids`, interrupted at a line (0 = not at all); returns how many lines ran."""
    tracer, outer = Interrupt(at), sys.gettrace()
    sys.settrace(tracer)
    try:
        forward(model, ids[:, -1:], mask, cache)
    except KeyboardInterrupt:
        assert tracer.count == at
    finally:
        sys.settrace(outer)
    return tracer.count


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[2]], ids=["labels", "queries"])
def test_interrupted_at_any_line(settings) -> None:
    """Refused or as before; never anything else. The last token seals a page."""
    model = tiny("mixtral")
    ids, mask = padded_prompt(model, (28, 25))
    base = PiKVCache(model, **settings, **ROOMY)
    for start, end in chunks(27, 24):
        forward(model, ids[:, start:end], mask[:, :end], base)
    expected = forward(model, ids[:, -1:], mask, base.fork())
    lines = step(model, ids, mask, base.fork(), 0)
    outcomes = set()
    for at in range(1, lines, lines // 20):
        cache = base.fork()
        step(model, ids, mask, cache, at)
        if cache.step.change is None and cache.log.length == 28:
            continue  # all was done
        try:
            out = forward(model, ids[:, -1:], mask, cache)
            outcomes.add("as before")
        except RuntimeError as error:
            assert "has failed" in str(error)
            if "crop" not in str(error):
                outcomes.add("reset")
                continue
            cache.crop(-1)
            out = forward(model, ids[:, -1:], mask, cache)
            outcomes.add("taken back")
        assert_close(out, expected)
    assert outcomes == {"as before", "taken back", "reset"}


# ---- sealing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, "snapkv"])
def test_sealing_that_fails(scheduler) -> None:
    """A compressor that cannot store what is held back: in a later layer, when some have sealed."""
    model = tiny("mixtral")
    ids, mask = padded_prompt(model, (30, 27))
    budget = {} if scheduler is None else {"scheduler": scheduler, "budget": 12}
    cache = PiKVCache(model, compressor="int8", **budget, **SMALL)
    with pytest.raises(ValueError, match="layer 2: .* NaN"), cache.holding():
        forward(model, ids, mask, cache)
        paged(cache)[2].state.tail.keys[0, 0, 3] = torch.nan
    assert_refused(model, ids, mask, cache, r"sealing has failed.*call `cache\.reset\(\)`")
    left = [layer.state.num_departed for layer in paged(cache)]
    with pytest.raises(RuntimeError, match="sealing has failed"):
        cache.compress()
    assert left == [layer.state.num_departed for layer in paged(cache)]
    cache.reset()
    forward(model, ids, mask, cache)
    assert sealed(paged(cache)[0], 0)


def test_an_error_within_holding_is_the_one_that_is_raised() -> None:
    model = tiny("mixtral")
    ids, mask = padded_prompt(model, (30, 27))
    cache = PiKVCache(model, scheduler="kvzip", budget=12, **SMALL)
    with pytest.raises(OutOfMemory), cache.holding():
        forward(model, ids[:, :20], mask[:, :20], cache)
        with failing(model.model.layers[1].mlp, OutOfMemory()):
            forward(model, ids[:, 20:], mask, cache)
    assert not cache.reading.is_held
    cache.crop(-10)
    cache.compress()
    assert sealed(paged(cache)[0], 0)
