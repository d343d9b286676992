"""Whole models with a compressed cache: as with a cache that holds the decoded pages."""

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    exact_model,
    forward,
    generate,
    paged,
    slabs_of,
    tiny,
)
from sealing import Asked, sealing
from tolerances import SUMS, VISIBLE
from variants import MIXED, VARIANTS, calibrated, distance, states
from zoo import prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.layer.handoff import take_layer
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM


@pytest.fixture
def asked(monkeypatch) -> Asked:
    return Asked(monkeypatch)


CASES = [
    (name, model)
    for name in VARIANTS | MIXED
    for model in (
        ["mixtral", "deepseek_v3", "gpt_oss", "jamba"] if name in COMPRESSORS else ["mixtral"]
    )
]

REGISTERED = pytest.mark.parametrize(
    "name, model_name",
    [case for case in CASES if case[1] in ("mixtral", "deepseek_v3") and case[0] in COMPRESSORS],
)


@pytest.mark.parametrize("name, model_name", CASES)
@pytest.mark.parametrize("lengths", [(29,), PADDED], ids=["one_row", "left_padded"])
def test_generation(name, model_name, lengths, asked) -> None:
    """Tokens and logits of a model whose own cache holds the decoded pages."""
    model = exact_model(model_name)
    inputs = prompt(model, lengths)
    cache = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    actual = generate(model, inputs, cache)
    oracle = sealing(model, model_name, calibrated(name, model), lengths, asked.of(cache))
    expected = generate(model, inputs, oracle)
    assert_same(actual, expected)
    assert_sealed_in_prefill_and_decode(cache, max(lengths))
    if name != "identity":
        exact = generate(model, inputs, dynamic(model))
        assert (expected.logits[1:] - exact.logits[1:]).abs().max() > VISIBLE, (
            "nothing was quantized"
        )


@REGISTERED
def test_beams(name, model_name, asked) -> None:
    model = exact_model(model_name)
    inputs = prompt(model, (27,))
    cache = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    options = {"num_beams": 3, "do_sample": False}
    actual = generate(model, inputs, cache, **options)
    oracle = sealing(model, model_name, calibrated(name, model), (27,), asked.of(cache))
    assert_same(actual, generate(model, inputs, oracle, **options))


@REGISTERED
@pytest.mark.parametrize("removed", [2, 11])
def test_crop(name, model_name, removed, asked) -> None:
    """Of the tail alone and into pages; what stays is not encoded again."""
    model = exact_model(model_name)
    ids = prompt(model, (40,))["input_ids"]
    ours = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    logits = []
    for is_ours in (True, False):
        cache = ours
        if not is_ours:
            given = asked.of(ours)
            cache = sealing(model, model_name, calibrated(name, model), (40,), given)
        forward(model, ids[:, :30], torch.ones(1, 30, dtype=torch.int64), cache)
        cache.crop(-removed)
        steps = [
            forward(model, ids[:, at : at + 1], torch.ones(1, at + 1, dtype=torch.int64), cache)
            for at in range(30 - removed, 40)
        ]
        logits.append(torch.cat(steps, dim=1))
    assert_close(logits[0], logits[1])


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8"])
def test_pages_are_encoded_once(name) -> None:
    """Codes do not drift while tokens are added."""
    model = tiny("mixtral")
    ids = prompt(model, (90,))["input_ids"]
    cache = PiKVCache(model, compressor=name, **SMALL)
    with torch.no_grad():
        model(ids[:, :24], **with_cache(cache))
        codes = slabs_of(paged(cache)[1])[0].fields["key_codes"][:, :, :5].clone()
        for token in ids[:, 24:].split(1, dim=1):
            model(token, **with_cache(cache))
    assert torch.equal(slabs_of(paged(cache)[1])[0].fields["key_codes"][:, :, :5], codes)


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_what_a_scheduler_keeps_is_not_changed_again(name) -> None:
    """The oldest tokens, in pages that were decoded and sealed again many times."""
    model = tiny("mixtral")
    keys, values = states("", 2, 1, 2, 80, 16).float()
    options = {"compressor": name, "page_size": 4, "window": 8}
    held = []
    for scheduler in (None, StreamingLLM(sinks=6, window=20)):
        layer = paged(PiKVCache(model, scheduler=scheduler, **options))[0]
        for at in range(0, 80, 4):
            layer.update(keys[:, :, at : at + 4], values[:, :, at : at + 4])
            assert take_layer() is layer
            layer.finish()
        spans = [slab.span([0], with_values=True) for slab in slabs_of(layer)]
        held.append(torch.cat([span["values"] for span in spans], dim=2)[:, :, :6])
    assert distance(held[1], held[0]) < SUMS
    assert distance(held[1], values[:, :, :6]) > VISIBLE
