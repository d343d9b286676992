"""`cache.report()`: bytes per token and the ratio against bfloat16, from storages and counts."""

import json
import re

import pytest
import torch
from helpers import ONE_ROW, PADDED, SMALL, forward, held_by, paged, tail_length, tail_states, tiny
from variants import calibrated
from zoo import build, prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.compressors import Identity
from pikv_hf.layer.handoff import take_layer
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM


def columns(text: str) -> list[str]:
    """The words of the table's head, whatever lines they are on."""
    head = text[text.index("┏") : text.index("┡")]
    return re.sub(r"[┏┳┓━┃\s]+", " ", head).split()


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_layer_takes_what_its_compressor_says(name, dtype) -> None:
    """Of 6,000 tokens, some of them open; bfloat16 is two bytes a number, whatever the model's is."""
    model = build("mixtral", dtype=dtype, num_hidden_layers=1, head_dim=64)
    cache = PiKVCache(model, compressor=calibrated(name, model), window=128)
    layer = paged(cache)[0]
    keys, values = torch.randn(2, 1, 2, 6000, 64, generator=torch.Generator().manual_seed(0))
    layer.update(keys.to(dtype), values.to(dtype))
    assert take_layer() is layer
    layer.finish()
    (row,) = cache.report().layers
    encoded = layer.state.pages.codec.bytes_per_token(
        64, 64, dtype.itemsize, layer.state.pages.page_size
    )
    sealed, room = 1 - tail_length(layer) / 6000, layer.state.tail.keys.shape[2] / 6000
    fixed = sum(t.nbytes for t in layer.state.pages.codec.tensors()) / 6000
    each = 2 * (sealed * encoded + room * 128 * dtype.itemsize) + fixed
    assert row.bytes_per_token == pytest.approx(each, rel=0.1)  # positions, room for new pages
    assert row.bf16_ratio == pytest.approx(2 * 128 * 2 / row.bytes_per_token)


@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("model_name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("scheduler", [None, StreamingLLM(sinks=2, window=8)], ids=str)
def test_numbers_are_those_of_the_storages(lengths, model_name, scheduler) -> None:
    model = tiny(model_name, "eager")
    inputs = prompt(model, lengths)
    cache = PiKVCache(model, compressor="int8", scheduler=scheduler, **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    report = cache.report()
    in_bf16 = sum(row.nbytes for row in report.layers if row.layer not in numbers_of(cache))
    for layer in paged(cache):
        row = report.layers[layer.state.layer_idx]
        held = len(lengths) * tail_length(layer)
        held += sum(held_by(layer, r).double().mean().item() for r in range(len(lengths)))
        assert row.bytes_per_token * held == pytest.approx(row.nbytes)
        full = 2 * numbers_of(cache)[layer.state.layer_idx] * len(lengths) * max(lengths)
        assert row.bf16_ratio == pytest.approx(full / row.nbytes)
        in_bf16 += full
    assert report.bf16_ratio == pytest.approx(in_bf16 / cache.nbytes)
    per_token = [r.bytes_per_token for r in report.layers if r.bytes_per_token is not None]
    assert report.bytes_per_token == pytest.approx(sum(per_token))
    assert len(per_token) == len(paged(cache))


def numbers_of(cache: PiKVCache) -> dict[int, int]:
    """Numbers that a token has in each paged layer."""
    states = {layer.state.layer_idx: tail_states(layer) for layer in paged(cache)}
    return {idx: k.shape[1] * (k.shape[3] + v.shape[3]) for idx, (k, v) in states.items()}


def test_a_full_cache_in_bfloat16_is_the_unit() -> None:
    """A bfloat16 model without compression: once; a float32 model: half."""
    for dtype, expected in ((torch.bfloat16, 1.0), (torch.float32, 0.5)):
        model = build("mixtral", "sdpa", dtype=dtype, head_dim=64)
        cache = PiKVCache(model)
        with torch.no_grad():
            model(prompt(model, (2500,))["input_ids"], **with_cache(cache))
        assert cache.report().bf16_ratio == pytest.approx(expected, rel=0.05)
        assert cache.report().ratio == pytest.approx(1.0, rel=0.05)


def test_table_and_numbers_say_the_same() -> None:
    model, inputs = tiny("mixtral"), prompt(tiny("mixtral"), ONE_ROW)
    cache = PiKVCache(model, compressor="int4", probe=True, **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    text, numbers = str(cache.report()), json.loads(json.dumps(cache.report().to_dict()))
    assert columns(text) == (
        [
            "tokens",
            "bytes/",
            "bf16/",
            "layers",
            "held",
            "as",
            "pages",
            "held",
            "MiB",
            "token",
            "held",
            "error",
        ]
    )
    cells = next(line for line in text.splitlines() if line.startswith("│")).split("│")
    layers = numbers["layers"]
    mean = sum(layer["bytes_per_token"] for layer in layers) / len(layers)
    ratio = sum(layer["bf16_ratio"] for layer in layers) / len(layers)
    assert [float(cell) for cell in cells[6:8]] == [round(mean, 1), round(ratio, 2)]
    assert float(cells[8]) == float(f"{numbers['error']:.2g}")
    assert f"in bfloat16 {numbers['bf16_ratio']:.2f} times" in text


def test_remarks_have_a_column_where_there_are_any() -> None:
    for name, has_remark in (("mixtral", False), ("gpt_oss", True)):
        model = tiny(name, "eager")
        cache = PiKVCache(model)
        model.generate(**prompt(model, ONE_ROW), **with_cache(cache), max_new_tokens=2)
        assert ("remark" in columns(str(cache.report()))) == has_remark


def test_an_empty_cache() -> None:
    report = PiKVCache(tiny("mixtral"), compressor=Identity()).report()
    assert report.bytes_per_token == 0.0 and report.bf16_ratio == 1.0
    assert [row.bytes_per_token for row in report.layers] == [None] * len(report.layers)
    assert "-" in str(report)
