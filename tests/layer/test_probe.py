"""`probe=True`: the error of attention output is that of a brute-force computation in float64."""

import functools

import pytest
import torch
from helpers import (
    ONE_ROW,
    PADDED,
    SMALL,
    Scattered,
    forward,
    paged,
    queries_of,
    sealed,
    spans_of,
    tiny,
)
from test_observed import asked
from tolerances import PROBE, SUMS, VISIBLE
from torch import Tensor
from variants import calibrated
from zoo import build, prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.compressors import Int2, Int8
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.loss_probe import Probe
from pikv_hf.schedulers import StreamingLLM

QUERIES = 16
SCALE = 0.3


class Mixed(Scattered):
    """Pages of int8 and of int2."""

    @property
    def members(self):
        return Int8(), Int2()


LOSSY = [name for name in COMPRESSORS if name != "identity"] + ["mixed"]
CASES = [(name, model) for name in LOSSY for model in ("mixtral", "deepseek_v3")]
NAMES = pytest.mark.parametrize("name", LOSSY)


def compressor_of(name, model):
    return Mixed() if name == "mixed" else calibrated(name, model)


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[H, Q, Dv] in float64, for query [H, Q, D] and states [H, T, D]."""
    scores = query.double() @ keys.double().mT * scale
    return scores.softmax(-1) @ values.double()


def decoded(layer, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [H, T, D] in the pages of a row, and their positions [T]."""
    spans = spans_of(layer, [row])
    keys, values = (torch.cat([s[n] for s in spans], 2)[0] for n in ("keys", "values"))
    return keys, values, torch.cat([s["positions"] for s in spans], 2)[0, 0].long()


# ---- one layer, by hand -------------------------------------------------------------------------


def feed(layer, keys, values, queries, chunks) -> float:
    """Give a layer tokens in pieces of `chunks` and their queries; the error by brute force."""
    sums, start = [0.0, 0.0], 0
    for end in chunks:
        before = layer.state.num_departed[0] if layer.state.num_departed else 0
        layer.update(keys[:, :, start:end], values[:, :, start:end])
        assert take_layer() is layer
        layer.observe(queries[:, :, start:end], SCALE)
        layer.finish()
        new = slice(before, layer.state.num_departed[0])
        for row in range(len(keys) if new.start < new.stop else 0):
            query = queries[row, :, max(end - QUERIES, 0) : end]
            query = query.unflatten(0, (keys.shape[1], -1)).flatten(1, 2)
            exact = attention(query, keys[row, :, new], values[row, :, new], SCALE)
            stored_keys, stored_values, _ = decoded(layer, row)
            stored = attention(query, stored_keys[:, new], stored_values[:, new], SCALE)
            sums[0] += (stored - exact).square().sum().item()
            sums[1] += exact.square().sum().item()
        start = end
    return (sums[0] / sums[1]) ** 0.5


def random_tokens(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return draw(2, 2, tokens, 16), draw(2, 2, tokens, 16), draw(2, 4, tokens, 16)


@NAMES
@pytest.mark.parametrize("seed", [0, 1])
def test_sum_over_seals(name, seed) -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, compressor=compressor_of(name, model), probe=True, **SMALL)
    layer = paged(cache)[1]
    # The first pieces hold fewer tokens than are asked, one is longer than a page, one seals none.
    pieces = [9, 10, 11, 30, 31, 32, 33, 50]
    expected = feed(layer, *random_tokens(50, seed), pieces)
    assert expected > VISIBLE
    assert layer.state.probe.error == pytest.approx(expected, rel=PROBE)


def test_order_of_magnitude() -> None:
    """int8, int4 and int2 leave errors as far apart as their steps: no number is a constant."""
    errors = []
    for name in ("int8", "int4", "int2"):
        layer = paged(PiKVCache(tiny("mixtral"), compressor=name, probe=True, **SMALL))[0]
        feed(layer, *random_tokens(60, 3), [60])
        errors.append(layer.state.probe.error)
    assert 0 < 8 * errors[0] < errors[1] < errors[2] / 2


def test_a_scheduler_does_not_thin_the_error_out() -> None:
    """It is that of tokens as they leave the tail, although older ones are sealed again with them."""
    errors = []
    for scheduler in (None, StreamingLLM(sinks=6, window=20)):
        options = {"compressor": "int4", "scheduler": scheduler, "probe": True}
        layer = paged(PiKVCache(tiny("mixtral"), page_size=4, window=8, **options))[0]
        keys, values, queries = random_tokens(92, 4)
        for start in range(0, 92, 4):
            part = slice(start, start + 4)
            layer.update(keys[:, :, part], values[:, :, part])
            assert take_layer() is layer
            layer.observe(queries[:, :, part], SCALE)
            layer.finish()
        errors.append(layer.state.probe.error)
    assert errors[0] == pytest.approx(errors[1]) and errors[0] > 0.01


# ---- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, model_name", CASES)
@pytest.mark.parametrize("lengths", [ONE_ROW, (30, 17)], ids=["one_row", "left_padded"])
def test_of_a_prompt(name, model_name, lengths) -> None:
    """Over the tokens that a prompt seals; of latents, what is expanded to values counts."""
    model = tiny(model_name)
    inputs = prompt(model, lengths)
    options = {"page_size": 4, "window": 9, "probe": True}
    cache = PiKVCache(model, compressor=compressor_of(name, model), **options)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    full = PiKVCache(model, page_size=4, window=9)
    forward(model, inputs["input_ids"], inputs["attention_mask"], full)
    report = cache.report()
    for layer, exact_layer, row_of in zip(paged(cache), paged(full), report.layers, strict=True):
        sums = torch.zeros(2, dtype=torch.float64)
        for row, length in enumerate(lengths):
            query = queries_of(layer)[row, :, :, -QUERIES:].flatten(1, 2)
            query = query[:, (query[0] != 0).any(-1)]
            assert query.shape[1] == min(QUERIES, length) * queries_of(layer).shape[2]
            keys, values, positions = decoded(layer, row)
            exact_keys, exact_values, same = decoded(exact_layer, row)
            assert torch.equal(positions, same) and len(positions) >= 2
            if layer.state.latent_rank is not None:
                values, exact_values = (
                    k[..., : layer.state.latent_rank] for k in (keys, exact_keys)
                )
            exact = attention(query, exact_keys, exact_values, layer.state.scale)
            stored = attention(query, keys, values, layer.state.scale)
            sums += torch.stack([(stored - exact).square().sum(), exact.square().sum()])
        expected = (sums[0] / sums[1]).sqrt().item()
        assert expected > VISIBLE
        assert row_of.error == pytest.approx(expected, rel=PROBE)
    errors = torch.tensor([row.error for row in report.layers])
    assert report.error == pytest.approx(errors.square().mean().sqrt().item())


def test_the_queries_asked_are_those_of_the_model() -> None:
    model, inputs = tiny("mixtral"), prompt(tiny("mixtral"), ONE_ROW)
    cache = PiKVCache(model, compressor="int4", probe=True, **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    for layer, queries in zip(paged(cache), asked("mixtral", inputs), strict=True):
        assert queries_of(layer).shape[3] == QUERIES
        assert torch.allclose(queries_of(layer), queries[:, :, :, -QUERIES:], atol=SUMS)
        assert layer.state.scale == model.config.head_dim**-0.5


@pytest.mark.parametrize("name", LOSSY)
def test_measuring_changes_nothing(name) -> None:
    """The same pages and logits; with it, methods that ask queries get no more of them."""
    model, inputs = tiny("mixtral"), prompt(tiny("mixtral"), PADDED)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = []
    for probe in (False, True):
        cache = PiKVCache(model, compressor=compressor_of(name, model), probe=probe, **SMALL)
        parts = [
            forward(model, ids[:, a:b], mask[:, :b], cache)
            for a, b in ((0, 20), (20, 21), (21, 30))
        ]
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)
    assert sealed(paged(cache)[0], 0)


# ---- on request ---------------------------------------------------------------------------------


def test_without_it_nothing_is_measured_or_shown(monkeypatch) -> None:
    model, inputs = tiny("mixtral"), prompt(tiny("mixtral"), ONE_ROW)
    measured = []
    monkeypatch.setattr(Probe, "measure", lambda *args: measured.append(args))
    for probe in (False, True):
        cache = PiKVCache(model, compressor="int8", probe=probe, **SMALL)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        assert bool(measured) == probe
        assert ("error" in str(cache.report())) == probe
        assert all((queries_of(layer) is not None) == probe for layer in paged(cache))


def test_report_before_and_after() -> None:
    model, inputs = tiny("mixtral"), prompt(tiny("mixtral"), ONE_ROW)
    cache = PiKVCache(model, compressor="int8", probe=True, **SMALL)
    assert cache.report().error is None and "error" in str(cache.report())
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    numbers = cache.report().to_dict()
    assert 0 < numbers["error"] < 0.05
    assert all(0 < layer["error"] < 0.05 for layer in numbers["layers"])
    cache.reset()
    assert cache.report().error is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(dtype) -> None:
    model = build("mixtral", dtype=dtype)
    inputs = prompt(model, ONE_ROW)
    errors = []
    for name in ("identity", "int8", "int4"):
        cache = PiKVCache(model, compressor=name, probe=True, **SMALL)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        errors.append(cache.report().error)
    assert errors[0] < 0.005 and errors[0] < errors[1] < 0.03 < errors[2] < 0.3


def test_bytes_held_count_the_sums() -> None:
    model, inputs = tiny("mixtral"), prompt(tiny("mixtral"), ONE_ROW)
    cache = PiKVCache(model, compressor="int8", probe=True, **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    held = {t.data_ptr() for layer in paged(cache) for t in layer.state.tensors()}
    assert all(layer.state.probe._sums.data_ptr() in held for layer in paged(cache))


@pytest.mark.parametrize("probe", [1, "yes", None])
def test_what_is_no_switch(probe) -> None:
    with pytest.raises(TypeError, match=f"`probe` is {probe!r}; it must be True or False"):
        PiKVCache(tiny("mixtral"), probe=probe)


def test_it_needs_a_model() -> None:
    with pytest.raises(ValueError, match=r"`probe` needs an attached cache: .*PiKVCache\(model"):
        PiKVCache(config=tiny("mixtral").config, probe=True)
