"""Quest: no key of a page has a larger logit than the bound of the page says."""

import functools

import pytest
import torch
from helpers import SMALL, exact_model, forward, paged
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules import read_two_turns
from tolerances import FLOAT64, ROUNDED, SUMS
from watching import Watch
from zoo import build, prompt

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.layer.planning import planned
from pikv_hf.routers import Query, Quest, TopK
from pikv_hf.routers.quest import bound_scores, page_bounds

CODES = ["identity", "int8", "int4", "turboquant", "fp8"]


def query_of(states: torch.Tensor) -> Query:
    return Query(states, 0.25, torch.zeros(1, 1, dtype=torch.int64), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 9),
    dim=st.integers(1, 17),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    zeros=st.booleans(),
)
def test_a_bound_of_random_keys(dtype, seed, tokens, dim, size, zeros) -> None:
    """It is reached where one key has the best number of each channel."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, 4, tokens, dim, generator=draw, dtype=dtype) * size
    states = torch.randn(2, 3, 2, 2, dim, generator=draw, dtype=dtype)
    if zeros:
        keys[:, :, 1], states[0] = 0, 0
    found = bound_scores(query_of(states), page_bounds(keys))
    logits = torch.einsum("rhgqd,rhmpd->rhgqmp", states, keys)
    largest = logits.amax(-1)
    margin = ROUNDED[dtype] * max(1.0, float(keys.abs().max() * states.abs().max() * dim))
    assert (found >= largest - margin).all()
    if tokens == 1:
        assert (found - largest).abs().max() <= margin


@functools.cache
def encoded(name: str, codes: str):
    model = exact_model(name)
    cache = PiKVCache(model, router=Quest(), compressor=codes, **SMALL)
    forward(model, *prompt(model, (41, 30)).values(), cache)
    plans = [planned(layer.state, Quest()) for layer in paged(cache)]
    return cache, [candidates.pages for plan in plans for candidates in plan.candidates]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("codes", CODES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_a_bound_of_encoded_pages(name, codes, seed) -> None:
    """Of the keys as the codes decode, and of latents with their rotary part."""
    for pages in encoded(name, codes)[1]:
        keys = pages.keys()
        draw = torch.Generator().manual_seed(seed)
        states = torch.randn(*keys.shape[:2], 2, 1, keys.shape[-1], generator=draw).double()
        states *= torch.randint(0, 3, states.shape, generator=draw)
        found = Quest().scores(query_of(states), pages)
        largest = torch.einsum("rhgqd,rhmpd->rhgqmp", states, keys).amax(-1)
        assert (found >= largest - SUMS).all()
        assert (found > largest + SUMS).any()


def test_pages_of_one_token_are_read_by_their_logit(monkeypatch) -> None:
    """Then the bound is the logit itself, and Quest reads the tokens of the largest."""
    model, watch = exact_model("mixtral"), Watch(monkeypatch, "quest", SUMS)
    cache = PiKVCache(model, router=Quest(fraction=0.3), page_size=1, window=4)
    read_two_turns(model, cache, lengths=(30, 22), second=(4, 2), steps=3)
    assert watch.checked


def test_layers_without_a_gate_use_the_bound(monkeypatch) -> None:
    """The first layer of deepseek_v3 is dense: all routers by experts read what Quest reads there."""
    model, reads = exact_model("deepseek_v3"), {}
    assert model.config.first_k_dense_replace == 1
    for router in (Quest(), TopK(), *(ROUTERS[n]() for n in ("balanced", "entropy", "pikv"))):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            read_two_turns(model, PiKVCache(model, router=router, **SMALL), steps=3)
        reads[type(router)] = {read for read in watch.reads if read.layer == 0}
        later = {read for read in watch.reads if read.layer == 1}
        assert any(len(read.pages) < len(read.held) for read in reads[type(router)])
        if isinstance(router, Quest):
            by_bound = later
        else:
            assert later != by_bound
    assert all(read == reads[Quest] for read in reads.values())


# ---- masks that hide sealed tokens later --------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("router", [Quest(fraction=0.6), Quest(top_p=0.9), TopK()], ids=str)
@pytest.mark.parametrize("options", [{}, {"scheduler": "adakv", "budget": 0.8}], ids=str)
def test_hidden_tokens_get_no_weight(name, router, options, monkeypatch) -> None:
    """Attention is that of the selected pages and the tail, without what the mask hides."""
    model, watch = exact_model(name), Watch(monkeypatch)
    watch.check_attention(monkeypatch, FLOAT64)
    ids, mask = prompt(model, (41, 33, 25)).values()
    cache = PiKVCache(model, router=router, **options, **SMALL)
    forward(model, ids, mask, cache)
    for step in range(4):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        changed = mask.clone()
        if step % 2:
            changed[0, 2:30], changed[1, 12:20] = 0, 0
        out = forward(model, ids[:, step : step + 1], changed, cache)
        assert (cache.columns.covered is None) == (step % 2 == 0)
        assert out.isfinite().all()
    assert watch.attended


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "all"])
def test_bfloat16(name, monkeypatch) -> None:
    """Every router selects in padded rows of a model in bfloat16, which has ties."""
    model, watch = halved(), Watch(monkeypatch)
    for storage in ({"compressor": "int4"}, {"scheduler": "adakv", "budget": 0.7}):
        cache = PiKVCache(model, router=ROUTERS[name](), **storage, **SMALL)
        watch.reads.clear()
        ids, mask = prompt(model, (47, 34)).values()
        forward(model, ids, mask, cache)
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            out = forward(model, ids[:, step : step + 1], mask, cache)
            assert out.dtype == torch.bfloat16 and out.isfinite().all()
        assert any(len(read.pages) < len(read.held) for read in watch.reads)


@functools.cache
def halved():
    return build("mixtral", "sdpa", dtype=torch.bfloat16, num_hidden_layers=2)
