"""What is read, in the report and as a picture."""

import pytest
import torch
from helpers import PADDED, SMALL, dynamic, forward, generate, paged, tiny
from tolerances import FLOAT32
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.plot import _tokens
from pikv_hf.model.versions import with_cache
from pikv_hf.routers import Oracle, Quest, RandomPages, TopK


def one_step(cache, model, length: int = 61, **options):
    """Read a prompt, and then one token; returns the attention weights of its layers."""
    ids = prompt(model, (length,))["input_ids"]
    mask = torch.ones_like(ids)
    forward(model, ids[:, :-1], mask[:, :-1], cache)
    with torch.no_grad():
        out = model(ids[:, -1:], attention_mask=mask, **options, **with_cache(cache))
    return out.attentions


@pytest.mark.parametrize(
    "router", [Quest(top_pages=3), RandomPages(top_pages=3), Oracle(top_pages=3)], ids=str
)
def test_recall_is_the_attention_on_what_is_read(router) -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, router=router, probe=True, **SMALL)
    weights = one_step(dynamic(model), model, output_attentions=True)[0][0, :, 0]
    one_step(cache, model)
    read = _tokens(paged(cache)[0].state, 0) == 2
    of_heads = read.repeat_interleave(weights.shape[0] // len(read), dim=0)
    expected = (weights * of_heads).sum(-1).mean()
    assert 0 < expected < 1
    row = cache.report().layers[0]
    assert abs(row.recall - float(expected)) < FLOAT32
    assert row.tokens_read == read.sum(-1).float().mean()
    assert row.hits == 2 * 3 and (row.misses, row.bytes_fetched) == (0, 0)


def test_without_a_router_everything_is_read() -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, **SMALL)
    generate(model, prompt(model, (61,)), cache)
    row = cache.report().layers[0]
    assert row.tokens_read == row.tokens_held == cache.get_seq_length()
    assert row.hits == row.pages and row.recall is None and row.pages_per_expert is None
    assert "tokens" in str(cache.report()) and "recall" not in str(cache.report())


def test_pages_per_expert() -> None:
    """Each full page counts for the expert with the largest share of its tokens' weights."""
    model = tiny("mixtral")
    for options in ({}, {"scheduler": "adakv", "budget": 0.6}):
        cache = PiKVCache(model, router="topk", **options, **SMALL)
        generate(model, prompt(model, (61, 50)), cache)
        for layer, row in zip(paged(cache), cache.report().layers, strict=True):
            full = sum(int(store.page_list().full.sum()) for store in layer.state.pages.slabs)
            assert sum(row.pages_per_expert) == full > 0
            assert len(row.pages_per_expert) <= 8


def test_remarks() -> None:
    """A layer without a gate, and a penalty without far pages, are named."""
    model = tiny("deepseek_v3")
    cache = PiKVCache(model, router="cache_aware", **SMALL)
    generate(model, prompt(model, (41,)), cache)
    first, *others = (row.why for row in cache.report().layers)
    assert first == "no gate: pages are selected by Quest's bound"
    assert all("`penalty` has no effect" in why for why in others)
    assert "no gate" in str(cache.report())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheduler": "keydiff", "budget": 0.5},
        {"router": TopK(top_pages=2), "probe": True},
        {"router": Quest(top_pages=2), "scheduler": "adakv", "budget": 0.6},
    ],
    ids=str,
)
def test_a_picture(options, tmp_path) -> None:
    """It has the tokens that are held and read of each head; padding is not held."""
    model = tiny("mixtral")
    cache = PiKVCache(model, **options, **SMALL)
    generate(model, prompt(model, PADDED), cache)
    for row in range(len(PADDED)):
        found = _tokens(paged(cache)[0].state, row)
        held = cache.layers[0].state.pages.held(row)
        start = cache.layers[0].state.starts[row]
        counts = (found[:, :start] > 0).sum(-1)
        assert torch.equal(counts, torch.zeros(2).long() if held is None else held)
        hidden = max(PADDED) - PADDED[row]
        assert not found[:, :hidden].any()
        if "router" not in options:
            assert set(found.unique().tolist()) <= {0, 2}
        figure = cache.plot(row)
        panels = [axes.get_title() for axes in figure.axes if axes.get_title()]
        expected = ["tokens held and last read"]
        expected += ["pages per expert", "recall"] if options.get("probe") else []
        assert panels == expected
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_nothing_to_draw() -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, **SMALL)
    with pytest.raises(ValueError, match="nothing to draw"):
        cache.plot()
    generate(model, prompt(model, (9,)), cache)
    with pytest.raises(ValueError, match="`row` is 1; it must be from 0 to 0"):
        cache.plot(1)


@pytest.mark.parametrize(
    ("longest", "top_pages", "size"),
    [(4096, 16, 16), (131072, None, 64), (32768, 16, 64), (131072, 256, 16)],
)
def test_page_size_auto(longest, top_pages, size) -> None:
    """The power of two next to sqrt(L / K), from 16 to 64."""
    model = tiny("mixtral", max_position_embeddings=longest)
    router = None if top_pages is None else Quest(top_pages=top_pages)
    with PiKVCache(model, page_size="auto", router=router) as cache:
        assert cache.report().settings["page_size"] == str(size)
