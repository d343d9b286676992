"""Where every page is selected, results are those without a router: by all routers, over all stores."""

import dataclasses
import functools
import itertools

import pytest
import torch
from helpers import SMALL, Scattered, assert_same, exact_model, forward, generate, paged, tiny
from tolerances import SUMS
from zoo import prompt

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.attention import routed
from pikv_hf.placements import Offload

MODELS = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")  # GQA, latents, sinks, norms of keys
SELECTING = [name for name in ROUTERS if name != "all"]
NEW = 6  # tokens, of which some are sealed
ROWS = {"one row": (47,), "padded rows": (47, 36, 29)}
STORAGE = {
    "plain": {},
    "int8": {"compressor": "int8"},
    "keydiff": {"scheduler": "keydiff", "budget": 0.7},
    "adakv": {"scheduler": "adakv", "budget": 0.7},
    "mixed": {"compressor": Scattered()},
    "pyramid": {"compressor": "pyramid"},
    "ram": {"placement": "offload"},
    "disk": {"placement": Offload(6000, 6000, "/tmp")},
}
CASES = [
    *itertools.product(MODELS, STORAGE, ["padded rows"]),
    *itertools.product(MODELS, ["plain", "int8", "adakv", "mixed"], ["one row"]),
]


def of_all(name: str, number: int):
    """A router that selects all pages, by one size or another."""
    if name == "adaptive":
        return ROUTERS[name](target=1.0)
    return ROUTERS[name](**({"top_p": 1.0}, {"fraction": 1.0}, {"top_pages": 99})[number % 3])


@pytest.fixture
def selects(monkeypatch) -> None:
    """Pages are selected one by one, although all of them are."""
    planned = routed.planned

    def plan(*args):
        return dataclasses.replace(planned(*args), reads_all=False)

    monkeypatch.setattr(routed, "planned", plan)


@functools.cache
def without(model: str, storage: str, rows: str, **mode):
    inputs = prompt(exact_model(model), ROWS[rows])
    cache = PiKVCache(exact_model(model), **STORAGE[storage], **SMALL)
    return generate(exact_model(model), inputs, cache, max_new_tokens=NEW, **mode)


def assert_as_without(name, model, storage, rows, router, **mode) -> PiKVCache:
    cache = PiKVCache(exact_model(model), router=router, **STORAGE[storage], **SMALL)
    inputs = prompt(exact_model(model), ROWS[rows])
    actual = generate(exact_model(model), inputs, cache, max_new_tokens=NEW, **mode)
    expected = without(model, storage, rows, **mode)
    assert torch.equal(actual.tokens, expected.tokens), name
    assert (actual.logits - expected.logits).abs().max() <= SUMS, name
    return cache


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=str)
def test_all_pages(number, case, selects) -> None:
    """In float64, where no code is a tie; each case with another router."""
    name = SELECTING[number % len(SELECTING)]
    for layer in paged(assert_as_without(name, *case, of_all(name, number // len(SELECTING)))):
        assert layer.state.routing.reads is not None, "no pages were selected"


@pytest.mark.parametrize("name", ["quest", "balanced", "hierarchical"])
@pytest.mark.parametrize("storage", ["plain", "adakv", "mixed"])
def test_beams_over_all_pages(name, storage, selects) -> None:
    assert_as_without(name, "mixtral", storage, "padded rows", of_all(name, 1), num_beams=3)


@pytest.mark.parametrize("model", MODELS)
def test_all_pages_in_float32(model, selects) -> None:
    inputs = prompt(tiny(model), ROWS["padded rows"])
    expected = generate(tiny(model), inputs, PiKVCache(tiny(model), **SMALL))
    for name in SELECTING[:: 3 if model == "mixtral" else 6]:
        cache = PiKVCache(tiny(model), router=of_all(name, 0), **SMALL)
        assert_same(generate(tiny(model), inputs, cache), expected)


@pytest.mark.parametrize("name", SELECTING)
def test_prompts_read_all_pages(name) -> None:
    """In pieces; also a last piece of one token, if `generate` reads the prompt."""
    model, outs = exact_model("mixtral"), []
    inputs = prompt(model, (29, 22))
    size = {"target": 0.1} if name == "adaptive" else {"top_pages": 1}
    for router in (None, ROUTERS[name](**size)):
        cache = PiKVCache(model, router=router, **SMALL)
        for start in range(0, 28, 7):
            part = inputs["input_ids"][:, start : start + 7]
            out = forward(model, part, inputs["attention_mask"][:, : start + 7], cache)
        cache = PiKVCache(model, router=router, **SMALL)
        options = {"prefill_chunk_size": 7, "max_new_tokens": 2}
        outs.append((out, generate(model, inputs, cache, **options).logits))
    (pieces, (first, second)), (routed_pieces, (routed_first, routed_second)) = outs
    assert (pieces - routed_pieces).abs().max() <= SUMS
    assert (first - routed_first).abs().max() <= SUMS
    assert (second - routed_second).abs().max() > SUMS, "the generated token selects"


def test_all_of_the_softmax_is_all_pages() -> None:
    """Also pages of which the part rounds to nothing."""
    model = exact_model("mixtral")
    inputs = prompt(model, (47,))
    router = ROUTERS["pikv"](bound=1000.0, top_p=1.0)
    cache = PiKVCache(model, router=router, **SMALL)
    actual = generate(model, inputs, cache, max_new_tokens=NEW)
    expected = without("mixtral", "plain", "one row")
    assert (actual.logits - expected.logits).abs().max() <= SUMS
