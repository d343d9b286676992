"""Under `torch.autocast` what is cached is computed with in its own dtype, as without it."""

import itertools

import pytest
import torch
from helpers import SMALL, dynamic, forward, paged, slabs_of, spans_of, tail_length, tiny
from test_combinations import OTHERS, SINGLE, UNCALIBRATED
from torch import Tensor
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.attention.function import pikv_attention
from pikv_hf.compressors import Svd
from pikv_hf.layer.paged_layer import PagedLayer

# Every scheduler, and every compressor.
PAIRS = [p for p in zip(SINGLE, itertools.cycle(UNCALIBRATED), strict=False) if p[0] != "kvzip"]
PARTS = ((0, 20), (20, 26), (26, 27), (27, 28), (28, 33))


@pytest.mark.parametrize(("scheduler", "compressor"), PAIRS)
def test_attention_and_pages_are_bit_for_bit_as_without_it(scheduler, compressor) -> None:
    outputs, pages = [], []
    for is_on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            layer, found = attended(scheduler, compressor)
        outputs.append(found)
        pages.append(held(layer))
    assert all(map(torch.equal, *outputs)) and outputs[0][-1].isfinite().all()
    assert pages[0] and all(map(torch.equal, *pages))


def attended(scheduler: str, compressor: str) -> tuple[PagedLayer, list[Tensor]]:
    """A layer, and what it has answered to queries behind its first tokens."""
    model = tiny("mixtral", num_hidden_layers=1, head_dim=16)
    methods = {"scheduler": scheduler, "compressor": OTHERS.get(compressor, compressor)}
    cache = PiKVCache(model, budget=16, **methods, **SMALL)
    layer, module = paged(cache)[0], model.model.layers[0].self_attn
    draw = torch.Generator().manual_seed(0)
    outputs = []
    for start, end in PARTS:
        query, key, value = (
            torch.randn(2, heads, end - start, 16, generator=draw) for heads in (4, 2, 2)
        )
        layer.update(key, value)
        mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)[None, None]
        mask = mask[..., -tail_length(layer) :]
        outputs.append(pikv_attention(module, query, key, value, mask, scaling=0.25)[0])
        if layer.state.awaits:
            layer.label(*chosen(2, end - start, draw))
        cache.step.release()
    return layer, outputs[1:]


def held(layer: PagedLayer) -> list[Tensor]:
    spans = (span for row in range(2) for span in spans_of(layer, [row]))
    return [span[name] for span in spans for name in ("positions", "keys", "values")]


def chosen(rows: int, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    scores, experts = torch.rand(rows, tokens, 4, generator=draw).topk(2)
    return experts, scores


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "methods",
    [
        {"scheduler": "lru", "budget": 64, "compressor": "int8"},
        {"compressor": Svd(rank=64)},
    ],
    ids=str,
)
def test_logits_are_those_of_a_full_cache(name, methods) -> None:
    model = tiny(name)
    inputs = prompt(model, (33, 29))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits, cache = [], PiKVCache(model, **methods, **SMALL)
    for each in (dynamic(model), cache):
        with torch.autocast("cpu", torch.bfloat16):
            parts = [forward(model, ids[:, a:b], mask[:, :b], each) for a, b in PARTS]
        logits.append(torch.stack([part[:, -1].float() for part in parts]))
    assert (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()
    assert all(slabs_of(layer) for layer in paged(cache))


def test_rotation_of_keys_is_measured_without_it() -> None:
    """Keys that autocast computes in float16 beside bfloat16 angles fit neither dtype."""
    model = build("mixtral", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        cache = PiKVCache(model, scheduler="expected_attention", budget=16, **SMALL)
    rotary = cache.states[0].rotary
    assert torch.equal(rotary.frequencies, model.model.rotary_emb.inv_freq.float())


def test_every_method_is_in_a_pair() -> None:
    assert {"kvzip", *(name for name, _ in PAIRS)} == set(SINGLE)
    assert {name for _, name in PAIRS} == set(UNCALIBRATED)
