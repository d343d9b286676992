"""Whole models with TurboQuant: as with a default cache that holds the same decoded tokens."""

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    forward,
    generate,
    tiny,
    two_layers,
)
from sealing import sealing
from tolerances import VISIBLE
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Int4, Pyramid, TurboQuant, turboquant
from pikv_hf.schedulers import StreamingLLM

METHODS = {"4": TurboQuant(), "3": TurboQuant(3, seed=1), "residual": TurboQuant(4, True)}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(name, method, mode) -> None:
    """Left-padded rows; against a default cache that holds the same decoded tokens."""
    model = two_layers(name)
    inputs = prompt(model, PADDED, seed=1)  # with seed 0 two beams are 2e-6 apart: a tie
    cache = PiKVCache(model, compressor=method, **SMALL)
    expected = generate(model, inputs, sealing(model, name, method, PADDED, {}), **mode)
    assert_same(generate(model, inputs, cache, **mode), expected)
    if not mode:
        assert_sealed_in_prefill_and_decode(cache, max(PADDED))
        exact = generate(model, inputs, dynamic(model))
        assert (expected.logits[1:] - exact.logits[1:]).abs().max() > VISIBLE, (
            "nothing was quantized"
        )


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("removed", [3, 13], ids=["in_the_tail", "in_pages"])
def test_crop(name, removed) -> None:
    model, method = tiny(name), TurboQuant(3)
    ids = prompt(model, (40, 40))["input_ids"]
    mask = torch.ones_like(ids)
    logits = []
    for cache in (
        PiKVCache(model, compressor=method, **SMALL),
        sealing(model, name, method, (40, 40), {}),
    ):
        forward(model, ids[:, :26], mask[:, :26], cache)
        forward(model, ids[:, 26:28], mask[:, :28], cache)
        cache.crop(-removed)
        steps = range(28 - removed, 40)
        logits.append(
            torch.cat([forward(model, ids[:, i : i + 1], mask[:, : i + 1], cache) for i in steps])
        )
    assert_close(*logits)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_under_a_scheduler(name) -> None:
    """One that drops nothing, but takes all pages out and seals them again.

    With more bits a vector of these 16 dims now and then gets another code; one of 64 does not.
    """
    model, method = tiny(name), TurboQuant(2)
    inputs = prompt(model, PADDED, seed=1)
    cache = PiKVCache(model, compressor=method, scheduler=StreamingLLM(), **SMALL)
    expected = generate(model, inputs, sealing(model, name, method, PADDED, {}))
    assert_same(generate(model, inputs, cache), expected)


def test_wrong_codebook_shows_in_the_logits(monkeypatch) -> None:
    """The control of the tests above: pages read with another codebook than the oracle's."""
    model, method = tiny("mixtral"), TurboQuant()
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, sealing(model, "mixtral", method, PADDED, {}))
    tables = turboquant._tables
    monkeypatch.setattr(turboquant, "_tables", lambda bits, dim, *rest: tables(bits, 576, *rest))
    with pytest.raises(AssertionError):
        assert_same(generate(model, inputs, PiKVCache(model, compressor=method, **SMALL)), expected)


def test_the_sketch_is_refused_where_pages_differ() -> None:
    """A scheduler would make it anew each time, for pages that may change their encoding."""
    model, mixed = tiny("mixtral"), Pyramid((TurboQuant(residual=True), Int4()), (0.5, 0.5))
    with pytest.raises(ValueError, match="cannot be encoded again"):
        PiKVCache(model, compressor=mixed, scheduler="streaming_llm")
    PiKVCache(model, compressor=mixed).detach()
    PiKVCache(model, compressor=TurboQuant(residual=True), scheduler="streaming_llm").detach()
