"""Caches whose pages are dealt to several places give what one place gives."""

import copy

import pytest
import torch
from helpers import (
    BUDGETED,
    FAMILIES,
    PADDED,
    SMALL,
    Scattered,
    assert_close,
    assert_same,
    exact_model,
    forward,
    generate,
    held_by,
    padded_prompt,
    paged,
    sealed,
    spans_of,
    tiny,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from on_one_cpu import OnOneCpu, places_of
from test_pages import CacheOperations
from test_table_of_places import METHODS, of_heads
from tolerances import SUMS
from zoo import prompt

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.placements import Experts, Offload, PiKVXor, Sharding, Spread
from pikv_hf.placements.site import PlacedLayer
from pikv_hf.schedulers import FastV
from pikv_hf.storage.page_table import PageTable

DEALT = {
    "spread2": OnOneCpu(2),
    "spread3": OnOneCpu(3),
    "spread5": OnOneCpu(5),
    "experts3": OnOneCpu(3, Experts()),
    "xor4": OnOneCpu(4, PiKVXor()),
    "offload2": OnOneCpu(2, Spread(offload=Offload(device_bytes=1500))),
}
COMPRESSED = {
    "lossless": {},
    "int4": {"compressor": "int4"},
    "svd": {"compressor": "svd"},
    "mixed": {"compressor": Scattered()},
    "adakv": {"scheduler": "adakv", "budget": 14},
    "adakv_mixed": {"scheduler": "adakv", "budget": 14, "compressor": Scattered()},
}
MODES = ({}, {"num_beams": 3}, {"prefill_chunk_size": 7})


def assert_dealt(cache: PiKVCache) -> None:
    """More than one place of a layer has pages."""
    tables = [layer.state.pages for layer in paged(cache)]
    assert any(sum(bool(t.of_place(n)) for n in range(t.places.count)) > 1 for t in tables)


def assert_same_pages(cache: PiKVCache, expected: PiKVCache) -> None:
    """KV heads hold the same tokens; keys and values are as attention of other layers leaves them."""
    for first, second in zip(paged(cache), paged(expected), strict=True):
        assert first.state.num_departed == second.state.num_departed
        for row in range(first.state.tail.batch):
            held, other = held_by(first, row), held_by(second, row)
            assert (held is None) == (other is None)
            if held is None:
                continue
            assert torch.equal(held, other)
            ours, theirs = (of_heads(spans_of(layer, [row])) for layer in (first, second))
            for one, two in zip(ours, theirs, strict=True):
                assert torch.equal(one["positions"], two["positions"])
                for name in ("keys", "values"):
                    assert torch.allclose(one[name], two[name], rtol=0, atol=SUMS)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dealt", ["spread3", "experts3"])
@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "chunks"])
def test_the_results_of_one_place(name, dealt, mode) -> None:
    model = exact_model(name)
    inputs = prompt(model, PADDED)
    one, many = (PiKVCache(model, placement=p, **SMALL) for p in (None, DEALT[dealt]))
    expected, actual = (generate(model, inputs, cache, **mode) for cache in (one, many))
    assert torch.equal(actual.tokens, expected.tokens)
    assert (actual.logits - expected.logits).abs().max() <= SUMS
    assert_dealt(many)
    assert_same_pages(many, one)
    for row, other in zip(many.report().layers, one.report().layers, strict=True):
        for field in ("pages", "tokens_held", "tokens_read", "kind", "paged", "why"):
            assert getattr(row, field) == getattr(other, field), field
    places = many.report().places
    assert [place.device for place in places] == ["cpu"]
    tables = [layer.state.pages for layer in paged(many)]
    assert places[0].pages == sum(slab.page_count for table in tables for slab in table.slabs)


@pytest.mark.parametrize("method", COMPRESSED)
@pytest.mark.parametrize("dealt", ["spread2", "experts3", "xor4", "offload2"])
def test_encodings_and_ragged_heads(method, dealt) -> None:
    model, options = exact_model("mixtral"), COMPRESSED[method] | SMALL
    inputs = prompt(model, PADDED)
    one, many = (PiKVCache(model, placement=p, **options) for p in (None, DEALT[dealt]))
    expected, actual = (generate(model, inputs, cache, num_beams=2) for cache in (one, many))
    assert torch.equal(actual.tokens, expected.tokens)
    assert (actual.logits - expected.logits).abs().max() <= SUMS
    assert_same_pages(many, one)


@pytest.mark.parametrize("scheduler", BUDGETED)
def test_schedulers(scheduler) -> None:
    model, given = exact_model("mixtral"), {"fastv": FastV(layer=1)}.get(scheduler, scheduler)
    options = {"scheduler": given, "budget": 14, "hold_prompt": scheduler == "kvzip"} | SMALL
    one, many = (PiKVCache(model, placement=p, **options) for p in (None, DEALT["spread3"]))
    expected, actual = (generate(model, prompt(model, PADDED), cache) for cache in (one, many))
    assert torch.equal(actual.tokens, expected.tokens)
    assert (actual.logits - expected.logits).abs().max() <= SUMS
    assert_dealt(many)
    assert_same_pages(many, one)


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_select_the_same_pages(router) -> None:
    model = exact_model("mixtral")
    options = {"router": router} | SMALL
    one, many = (PiKVCache(model, placement=p, **options) for p in (None, DEALT["experts3"]))
    inputs = prompt(model, (60, 51, 23))
    # The embedding of token 0 is zero: all pages would be equal to its queries.
    expected, actual = (
        generate(model, inputs, cache, suppress_tokens=[0]) for cache in (one, many)
    )
    assert torch.equal(actual.tokens, expected.tokens)
    assert (actual.logits - expected.logits).abs().max() <= SUMS
    assert_same_pages(many, one)
    for row, other in zip(many.report().layers, one.report().layers, strict=True):
        assert (row.tokens_read, row.hits) == (other.tokens_read, other.hits)


@pytest.mark.parametrize("dealt", ["spread3", "experts3", "xor4"])
@pytest.mark.parametrize("method", ["lossless", "adakv"])
def test_a_row_alone_is_a_row_of_a_batch(dealt, method) -> None:
    model, options = exact_model("mixtral"), COMPRESSED[method] | SMALL
    inputs = prompt(model, PADDED)
    cache = PiKVCache(model, placement=DEALT[dealt], **options)
    together = generate(model, inputs, cache)
    for row, length in enumerate(PADDED):
        own = {name: t[row : row + 1, -length:] for name, t in inputs.items()}
        alone = PiKVCache(model, placement=DEALT[dealt], **options)
        result = generate(model, own, alone)
        assert torch.equal(result.tokens[0, length:], together.tokens[row, max(PADDED) :])
        assert (result.logits[:, 0] - together.logits[:, row]).abs().max() <= SUMS
        start = max(PADDED) - length
        for one, all_rows in zip(paged(alone), paged(cache), strict=True):
            assert torch.equal(held_by(one, 0), held_by(all_rows, row))
            pairs = zip(
                of_heads(spans_of(one, [0])), of_heads(spans_of(all_rows, [row])), strict=True
            )
            for first, second in pairs:
                assert torch.equal(first["positions"] + start, second["positions"])


# ---- rows that leave, and pages that are shared -------------------------------------------------


@pytest.mark.parametrize("dealt", [None, "spread5", "experts3", "offload2"])
@pytest.mark.parametrize("method", ["lossless", "mixed", "adakv"])
@pytest.mark.parametrize("lengths", [(40, 3), (9, 40)], ids=str)
def test_a_short_row_stays_when_a_long_one_is_dropped(dealt, method, lengths) -> None:
    """Some stores then hold no page of any row that is left."""
    model, options = tiny("mixtral", num_hidden_layers=2), COMPRESSED[method] | SMALL
    ids, mask = padded_prompt(model, lengths)
    row = lengths.index(min(lengths))
    cache = PiKVCache(model, placement=DEALT.get(dealt), **options)
    alone = PiKVCache(model, **options)
    forward(model, ids, mask, cache)
    own = mask[row : row + 1].bool()
    forward(model, ids[row : row + 1][own][None], torch.ones(1, int(own.sum())), alone)
    cache.batch_select_indices(torch.tensor([row]))
    assert all(slab.page_count for layer in paged(cache) for slab in layer.state.pages.slabs)
    for token in torch.randint(3, 100, (9, 1, 1)):
        own = torch.cat([own, torch.ones(1, 1, dtype=torch.bool)], dim=1)
        expected = forward(model, token, torch.ones(1, int(own.sum())), alone)
        assert_close(forward(model, token, own.long(), cache), expected)


@pytest.mark.parametrize("dealt", DEALT)
@pytest.mark.parametrize("method", ["lossless", "mixed", "int4"])
def test_chunks_of_rows_that_begin_later(dealt, method) -> None:
    """Chunk by chunk, one row seals many pages and the others few or none, for other places."""
    model, options = exact_model("mixtral"), COMPRESSED[method] | SMALL
    ids, mask = padded_prompt(model, (72, 30, 8, 51))
    one, many = (PiKVCache(model, placement=p, **options) for p in (None, DEALT[dealt]))
    for start in range(0, ids.shape[1], 24):
        end = start + 24
        expected, actual = (
            forward(model, ids[:, start:end], mask[:, :end], cache) for cache in (one, many)
        )
        seen = mask[:, start:end].bool()
        assert (actual - expected)[seen].abs().max() <= SUMS
        assert_same_pages(many, one)


@pytest.mark.parametrize("copied", ["fork", "deepcopy"])
@pytest.mark.parametrize("dealt", DEALT)
def test_copies_go_on_apart(copied, dealt) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    inputs = prompt(model, (40,))
    cache = PiKVCache(model, placement=DEALT[dealt], **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    before = [sealed(layer, 0) for layer in paged(cache)]
    new = cache.fork() if copied == "fork" else copy.deepcopy(cache)
    shared = [{t.data_ptr() for t in layer.state.pages.tensors()} for layer in paged(cache)]
    for layer, pointers in zip(paged(new), shared, strict=True):
        own = {t.data_ptr() for t in layer.state.pages.tensors()}
        assert bool(own & pointers) == (copied == "fork")
    more, mask = prompt(model, (9,), seed=1)["input_ids"], torch.ones(1, 49)
    logits = forward(model, more, mask, new)
    assert before == [sealed(layer, 0) for layer in paged(cache)], "the first cache is as it was"
    assert_close(logits, forward(model, more, mask, cache))
    assert_same_pages(new, cache)


def test_beams_over_places_are_beams_over_one() -> None:
    model = exact_model("mixtral")
    inputs = prompt(model, PADDED)
    caches = [
        PiKVCache(model, placement=p, **SMALL) for p in (None, OnOneCpu(5), DEALT["experts3"])
    ]
    options = {"num_beams": 4, "max_new_tokens": 24}
    expected, *others = (generate(model, inputs, cache, **options) for cache in caches)
    for actual in others:
        assert_same(actual, expected)


class PlacedOperations(CacheOperations):
    """The operations of a cache, with the pages of the layer dealt to places."""

    @initialize(
        page_size=st.integers(1, 5),
        window=st.integers(1, 6),
        router=st.sampled_from([None, "all"]),
        compressor=st.sampled_from([None, Scattered()]),
        method=st.sampled_from(METHODS),
    )
    def make(self, page_size, window, router, compressor, method: tuple[Sharding, int]) -> None:
        super().make(page_size, window, router, compressor)
        state = self.cache.states[0]
        layer = PlacedLayer(0, 0, 1, 8)
        state.pages = PageTable(
            state.pages.codec, page_size, places_of(*method, layer), state.pages.digest
        )


TestPlacedOperations = PlacedOperations.TestCase
TestPlacedOperations.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
