"""Weights out of attention: they are exact, and records that they add to equal those asked again."""

import pytest
import torch
from helpers import (
    SMALL,
    assert_same,
    chunks,
    forward,
    generate,
    paged,
    rows_of,
    slabs_of,
    spans_of,
    tail_states,
    tiny,
)
from pikv_kernels import (
    Quantized,
    partial_attention,
    quantized_attention,
    quantized_weights,
    weighted_attention,
    weighted_attention_reference,
)
from pikv_kernels.weighted_attention import FEW
from tolerances import LOGITS, SUMS, WIDE_SCORES
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.attention import function as attention
from pikv_hf.layer.records import recorded, tail_record
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import H2O, LRU
from pikv_hf.schedulers.attention_mass import attention_weights
from pikv_hf.storage.token_table import TokenTable

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {"few": (2, 2, 4, 37, 24), "many": (1, 2, 8, FEW // 128 + 77, 64)}
SCHEDULERS = {"h2o": H2O(recent_ratio=0.3), "lru": LRU(threshold=0.03)}


def drawn(shape, dtype, seed: int = 0):
    """A query, keys and values that are not dense, and a mask that hides some tokens of each row."""
    rows, heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(rows, heads, queries, dim, generator=generator)
    key, value = (torch.randn(rows, heads, keys + 5, dim, generator=generator) for _ in "kv")
    mask = torch.zeros(rows, 1, 1, keys, dtype=dtype)
    mask.masked_fill_(
        torch.rand(rows, 1, 1, keys, generator=generator) < 0.3, torch.finfo(dtype).min
    )
    key, value = key[:, :, :keys], value[:, :, 5:]
    return [tensor.to(dtype) for tensor in (query, key, value, mask)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_weighted_attention(shape, dtype, masked) -> None:
    """As exact as the fused kernel, whose scores are never rounded to 16 bits."""
    query, key, value, mask = drawn(shape, dtype)
    mask = mask if masked else None
    scale = shape[-1] ** -0.5
    wide = [None if t is None else t.double() for t in (query, key, value, mask)]
    expected = weighted_attention_reference(*wide, scale)
    fused, _ = partial_attention(query, key, value, mask, scale)
    out, lse, weights = weighted_attention(query, key, value, mask, scale)
    assert out.dtype == dtype and weights.dtype == torch.promote_types(dtype, torch.float32)
    least = (fused.double() - expected[0]).abs().max() + 2 * torch.finfo(dtype).eps
    assert (out.double() - expected[0]).abs().max() <= 1.5 * least
    assert (lse.double() - expected[1]).abs().max() <= WIDE_SCORES
    assert (weights.double() - expected[2]).abs().max() <= WIDE_SCORES * expected[2].max()
    assert torch.allclose(weights.sum(-1), torch.ones(()).to(weights), atol=SUMS)


def test_rounded_scores_would_be_less_exact() -> None:
    query, key, value, _ = drawn(SHAPES["many"], torch.bfloat16)
    wide = [t.double() for t in (query, key, value)]
    _, expected, _ = weighted_attention_reference(*wide, None, 0.125)
    rounded = ((query @ key.mT).float() * 0.125).logsumexp(-1)
    _, lse, _ = weighted_attention(query, key, value, None, 0.125)
    assert 10 * (lse - expected).abs().max() < (rounded - expected).abs().max()


@pytest.mark.parametrize("tokens", [8, 29, 32])
def test_quantized_weights(tokens) -> None:
    """The softmax of the same scores, a mask added to them."""
    generator = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-128, 128, (2, 2, 3, 4, 8, 16), generator=generator, dtype=torch.int8)
    scales = torch.rand(2, 2, 3, 4, 8, 1, generator=generator) / 64
    keys, values = (Quantized(*each) for each in zip(codes, scales, strict=True))
    query = torch.randn(2, 3, 5, 16, generator=generator)
    out, lse, weights = quantized_weights(query, keys, values, tokens, 0.25)
    plain, plain_lse = quantized_attention(query, keys, values, tokens, 0.25)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    numbers = [(c.double() * s).flatten(2, 3) for c, s in zip(codes, scales, strict=True)]
    scores = query.double() @ numbers[0].mT[..., :tokens] * 0.25
    assert torch.allclose(weights.double(), scores.softmax(-1), atol=SUMS)
    mask = torch.zeros(2, 1, 1, tokens).masked_fill_(
        torch.arange(tokens) % 3 == 0, torch.finfo(torch.float32).min
    )
    hidden_out, hidden_lse, hidden = quantized_weights(query, keys, values, tokens, 0.25, mask)
    expected = (scores + mask).softmax(-1)
    assert torch.allclose(hidden.double(), expected, atol=SUMS)
    assert torch.allclose(hidden_lse.double(), (scores + mask).logsumexp(-1), atol=SUMS)
    assert torch.allclose(hidden_out.double(), expected @ numbers[1][:, :, :tokens], atol=SUMS)


def asked_again(monkeypatch) -> None:
    monkeypatch.setattr(attention, "counted_slabs", lambda *_: None)


def read(model, lengths, options, *, crop: int = 0):
    """The cache behind a prompt and generated tokens, its kept positions, and all logits."""
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, **{"page_size": 8, "window": 6, **options})
    logits = []
    for start, end in chunks(59, 40):
        logits.append(forward(model, ids[:, start:end], mask[:, :end], cache)[:, -1])
        if crop and end == 52:
            cache.crop(-crop)
            for at in range(52 - crop, 52):
                forward(model, ids[:, at : at + 1], mask[:, : at + 1], cache)
    return cache, torch.stack(logits)


def positions(cache) -> list[torch.Tensor]:
    rows = range(rows_of(paged(cache)[0]))
    return [s["positions"] for x in paged(cache) for r in rows for s in spans_of(x, [r])]


def assert_same_kept(cache, other) -> None:
    for mine, theirs in zip(positions(cache), positions(other), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("compressor", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_counted_equals_asked_again(name, compressor, scheduler) -> None:
    """What five generated tokens have added is what all of their queries add, asked together."""
    model = tiny(name)
    options = {"scheduler": scheduler, "budget": 30, "compressor": compressor}
    cache, _ = read(model, (59, 59), options)
    for layer in paged(cache):
        counted, queries = layer.state.observed.counted, layer.state.observed.pending
        assert queries.shape[3] == 3, "some tokens were generated since the last were sealed"
        (span,) = spans_of(layer, [0, 1])
        opened = tail_record(layer.state)
        newest = torch.arange(59 - opened.shape[2], 59).expand(*opened.shape[:3])
        every = span.followed_by(
            TokenTable({"keys": tail_states(layer)[0], "record": opened, "positions": newest})
        )
        expected = recorded(layer.state, [0, 1], every, queries)
        assert (expected != every["record"]).any()
        if isinstance(scheduler, H2O):
            assert torch.allclose(counted, expected, atol=SUMS)
        else:  # a weight at the threshold may fall on either side
            assert (counted != expected).float().mean() <= (0.01 if compressor else 0)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(59,), (59, 59), (59, 46)], ids=str)
@pytest.mark.parametrize("crop", [0, 1, 5])
def test_same_tokens_stay(name, lengths, crop, monkeypatch) -> None:
    """As if every query were asked again; tokens that are taken back are not counted."""
    model = tiny(name)
    options = {"scheduler": "h2o", "budget": 30}
    cache, logits = read(model, lengths, options, crop=crop)
    counts = all(layer.state.observed.counted is not None for layer in paged(cache))
    assert counts == (len(set(lengths)) == 1), "rows of different lengths are asked again"
    asked_again(monkeypatch)
    other, expected = read(model, lengths, options, crop=crop)
    assert not any(layer.state.observed.counted is not None for layer in paged(other))
    assert (logits - expected).abs().max() <= LOGITS
    assert_same_kept(cache, other)


def test_what_gives_no_weights_is_asked_again() -> None:
    cache, _ = read(
        tiny("mixtral"), (59,), {"scheduler": "h2o", "budget": 30, "compressor": "turboquant"}
    )
    assert all(layer.state.observed.counted is None for layer in paged(cache))
    assert all(layer.state.observed.pending.shape[3] == 3 for layer in paged(cache))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate(options, monkeypatch) -> None:
    """Beams and drafts count some steps and ask others again: the same tokens."""
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    found = [
        generate(
            model,
            inputs,
            PiKVCache(model, scheduler="h2o", budget=24, **SMALL),
            max_new_tokens=30,
            **options,
        )
    ]
    asked_again(monkeypatch)
    cache = PiKVCache(model, scheduler="h2o", budget=24, **SMALL)
    assert_same(found[0], generate(model, inputs, cache, max_new_tokens=30, **options))


def test_forks_count_apart() -> None:
    """What one fork counts is not written into the pages of the other."""
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler="h2o", budget=200, **SMALL)
    for start, end in chunks(45, 40):
        forward(model, ids[:, start:end], mask[:, :end], cache)
    fork = cache.fork(1)
    before = [[s["record"].clone() for s in spans_of(x, [0])] for x in paged(fork)]
    for at in range(45, 60):
        forward(model, ids[:, at : at + 1], mask[:, : at + 1], cache)
    after = [[s["record"] for s in spans_of(x, [0])] for x in paged(fork)]
    assert all(
        torch.equal(a, b)
        for mine, other in zip(before, after, strict=True)
        for a, b in zip(mine, other, strict=True)
    )


@pytest.mark.parametrize("compressor", [None, "int4"])
@pytest.mark.parametrize("scheduler", ["h2o", "adakv"])
def test_gradients_go_through_attention_and_not_into_records(scheduler, compressor) -> None:
    model = tiny("mixtral")
    ids = prompt(model, (40,))["input_ids"]
    options = {"scheduler": scheduler, "budget": 24, "compressor": compressor}
    with torch.enable_grad():
        cache = PiKVCache(model, page_size=4, window=6, **options)
        for start, end in chunks(40, 30):
            logits = model(ids[:, start:end], **with_cache(cache)).logits
        (gradient,) = torch.autograd.grad(logits.sum(), [model.lm_head.weight])
    assert gradient.isfinite().all()
    for layer in paged(cache):
        kept = [layer.state.observed.counted, layer.state.observed.record]
        kept += [slab.meta.tensors.get("record") for slab in slabs_of(layer)]
        assert not any(tensor.requires_grad for tensor in kept if tensor is not None)


def test_cannot_write_what_inference_mode_made() -> None:
    """Records of pages that inference mode made are replaced outside of it."""
    model = tiny("mixtral")
    inputs = prompt(model, (59,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = PiKVCache(model, scheduler="h2o", budget=200, page_size=4, window=6)
        with mode():
            forward(model, ids[:, :40], mask[:, :40], cache)
        for at in range(40, 59):
            last = forward(model, ids[:, at : at + 1], mask[:, : at + 1], cache)
        logits.append(last)
    assert torch.allclose(*logits, atol=SUMS)


def test_float64() -> None:
    model = build("mixtral", dtype=torch.float64)
    model.set_experts_implementation("eager")
    cache, logits = read(model, (59,), {"scheduler": "h2o", "budget": 30})
    assert logits.dtype == torch.float64
    assert paged(cache)[0].state.observed.counted.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_default_dtype(dtype) -> None:
    """Queries that see no token attend to none, whatever torch's default dtype."""
    queries, keys = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 9, 8)
    newest = torch.full((1, 1, 9), 100)
    torch.set_default_dtype(dtype)
    try:
        found = [w.clone() for w, _ in attention_weights(queries, keys, newest, 50, 0.3)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(weights.dtype == torch.float32 and not weights.any() for weights in found)
