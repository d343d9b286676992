"""Each method of transformers' Cache does to a PiKVCache what it does to a DynamicCache."""

import functools

import pytest
import torch
from helpers import (
    FAMILIES,
    ONE_ROW,
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    chunks,
    dynamic,
    forward,
    generate,
    paged,
    sealed,
    slabs_of,
    tail_length,
    tiny,
)
from transformers import DynamicCache
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.model.versions import with_cache

PREFILL = 22  # of prompts of 30: the other tokens come one by one
ATTENTION_ONLY = ["mixtral", "deepseek_v3", "olmoe"]  # layers that can always be cropped
families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def pair(name):
    """A model, its prompt, and two caches that hold the same 27 tokens of it, 20 of them paged."""
    model = tiny(name)
    inputs = prompt(model, PADDED)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    caches = PiKVCache(model, **SMALL), dynamic(model)
    for cache in caches:
        feed(model, ids[:, :27], mask, cache)
    assert all(len(slabs_of(layer)) > 1 for layer in paged(caches[0]))
    return model, ids, mask, caches


def feed(model, ids, mask, cache, start=0):
    """Logits of a prefill (of an empty cache) and of single tokens, and the end of `ids`."""
    out = []
    for begin, end in chunks(ids.shape[1], PREFILL) if start == 0 else singles(start, ids.shape[1]):
        out.append(forward(model, ids[:, begin:end], mask[:, :end], cache))
    return torch.cat(out, dim=1)


def singles(start, end):
    return [(i, i + 1) for i in range(start, end)]


def assert_continue_alike(model, ids, mask, caches, start) -> None:
    """12 more tokens, so that pages are sealed behind what the method left."""
    generator = torch.Generator().manual_seed(5)
    more = torch.randint(3, 100, (len(ids), 12), generator=generator)
    ids = torch.cat([ids[:, :start], more], dim=1)
    mask = torch.cat([mask[:, :start], torch.ones_like(more)], dim=1)
    ours, theirs = (feed(model, ids, mask, cache, start) for cache in caches)
    assert_close(ours, theirs)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == start + 12


@families
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 2], [0, 0, 0]], ids=str)
def test_reorder_cache(pair, index) -> None:
    model, ids, mask, caches = pair
    pages = stored_pages(caches[0])
    index = torch.tensor(index)
    for cache in caches:
        cache.reorder_cache(index)
    assert stored_pages(caches[0]) <= pages, "pages were copied"
    assert_continue_alike(model, ids[index], mask[index], caches, 27)


def stored_pages(cache):
    slabs = [slab for layer in paged(cache) for slab in slabs_of(layer)]
    return {slab.fields["keys"].data_ptr() for slab in slabs}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_batch_repeat_interleave(pair) -> None:
    model, ids, mask, caches = pair
    for cache in caches:
        cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1, 2, 2]
    assert_continue_alike(model, ids[rows], mask[rows], caches, 27)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rows_without_a_paged_layer(name) -> None:
    """Where all layers slide, the ids that the cache knows follow the rows, too."""
    kinds = {} if name == "mixtral" else {"layer_types": ["sliding_attention"] * 4}
    model = build(name, sliding_window=8, **kinds)
    ids = prompt(model, (20, 20))["input_ids"]
    caches = PiKVCache(model), dynamic(model)
    assert not any(isinstance(layer, PagedLayer) for layer in caches[0].layers)
    outs = []
    for cache in caches:
        forward(model, ids, torch.ones_like(ids), cache)
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([3, 0, 1, 5, 4, 2]))
        cache.batch_select_indices(torch.tensor([0, 4, 5]))
        text = torch.cat([ids[[1, 1, 0]], ids[:1, :4].expand(3, -1)], dim=1)
        mask = torch.ones_like(text)
        outs.append(generate(model, {"input_ids": text, "attention_mask": mask}, cache))
    assert_same(*outs)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("index", [[1], [2, 0], [True, False, True]], ids=str)
def test_batch_select_indices(pair, index) -> None:
    model, ids, mask, caches = pair
    before = paged_bytes(caches[0])
    index = torch.tensor(index)
    for cache in caches:
        cache.batch_select_indices(index)
    rows = len(ids[index])
    assert paged_bytes(caches[0]) <= before * rows / 3 * 1.1, "the other rows' pages are held"
    assert_continue_alike(model, ids[index], mask[index], caches, 27)


def paged_bytes(cache) -> int:
    rows = cache.report().to_dict()["layers"]
    return sum(row["nbytes"] for row in rows if row["paged"])


@pytest.mark.parametrize("name", ATTENTION_ONLY)
@pytest.mark.parametrize("removed", [0, 1, 5, 9, 15, 26])
def test_crop(pair, removed) -> None:
    """Within the tail, into pages that decoding sealed, and into those of the prefill."""
    model, ids, mask, caches = pair
    for cache in caches:
        cache.crop(-removed)
    assert caches[0].get_seq_length() == 27 - removed
    assert all(p < 27 - removed for layer in paged(caches[0]) for p in sealed(layer, 0))
    assert_continue_alike(model, ids, mask, caches, 27 - removed)


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_crop_of_everything(pair) -> None:
    model, ids, mask, (cache, _) = pair
    cache.crop(-27)
    assert cache.get_seq_length() == 0
    fresh = dynamic(model)
    assert_close(feed(model, ids, mask, cache), feed(model, ids, mask, fresh))


@pytest.mark.parametrize("name", ATTENTION_ONLY)
@pytest.mark.parametrize("times", [1, 3])
def test_recording(pair, times) -> None:
    """While recording nothing is sealed before `crop`, which takes back what was rejected."""
    model, ids, mask, caches = pair
    before = [sealed(layer, 0) for layer in paged(caches[0])]
    drafts = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(2))
    end, text = 27, ids[:, :27]
    for cache in caches:
        cache.activate_past_recording()
    for rejected in (2, 9, 0)[:times]:
        text = torch.cat([text[:, :end], drafts], dim=1)
        full = torch.cat([mask[:, :27], torch.ones(3, text.shape[1] - 27).long()], dim=1)
        logits = [forward(model, drafts, full, cache) for cache in caches]
        assert_close(*logits)
        if end == 27:
            assert before == [sealed(layer, 0) for layer in paged(caches[0])]
        for cache in caches:
            cache.crop(-rejected)
        end += 9 - rejected
        assert caches[0].get_seq_length() == end
        for layer in paged(caches[0]):
            assert tail_length(layer) < 8, "the verified tokens were not sealed"
    mask = torch.cat([mask[:, :27], torch.ones(3, end - 27).long()], dim=1)
    assert_continue_alike(model, text[:, :end], mask, caches, end)


@families
def test_reset(pair) -> None:
    model, _, _, (cache, _) = pair
    cache.activate_past_recording()
    cache.reset()
    assert cache.get_seq_length() == 0 and paged_bytes(cache) == 0
    assert not any(layer.record_past for layer in paged(cache))
    other = prompt(model, (25, 28), seed=9)  # another batch size
    ids, mask = other["input_ids"], other["attention_mask"]
    assert_close(feed(model, ids, mask, cache), feed(model, ids, mask, dynamic(model)))


@families
def test_properties(pair) -> None:
    _, _, _, (cache, reference) = pair
    assert len(cache) == len(reference)
    for name in ("is_sliding", "is_linear", "is_dummy", "is_croppable", "is_initialized"):
        assert getattr(cache, name) == getattr(reference, name), name
    assert cache.get_max_length() == reference.get_max_length()
    assert cache.is_compileable is False
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer):
            assert cache.get_seq_length(idx) == cache.get_query_offset(idx) == 27
            tail = tail_length(layer)
            assert cache.get_mask_sizes(3, idx) == (tail + 3, 27 - tail)
            assert not cache.is_recording_past(idx)
        elif not reference.is_linear[idx]:
            assert cache.get_mask_sizes(3, idx) == reference.get_mask_sizes(3, idx)
    assert "seq_length=27" in repr(cache) and "page_size=4" in repr(cache)
    assert type(cache.model).__name__ in repr(cache)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_iteration(pair) -> None:
    """Keys, values and window of each layer, as `DynamicCache(cache)` reads them."""
    model, ids, mask, (cache, reference) = pair
    visible = mask[:, None, :27, None].bool()
    for ours, theirs in zip(cache, reference, strict=True):
        shown = visible[:, :, -theirs[0].shape[2] :]
        for mine, their in zip(ours[:2], theirs[:2], strict=True):
            assert_close(mine * shown, their * shown)
        assert ours[2] == theirs[2]
    if not any(reference.is_sliding):  # DynamicCache does not take over where these are
        copied = DynamicCache(list(cache), config=model.config)
        assert_continue_alike(model, ids, mask, (copied, reference), 27)


@families
@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
def test_unattached(name, lengths) -> None:
    model = tiny(name)
    cache = PiKVCache(config=model.config, **SMALL)
    assert cache.model is None and "unattached" in repr(cache)
    inputs = prompt(model, lengths)
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 7}):
        expected = generate(model, inputs, dynamic(model), **options)
        assert_same(generate(model, inputs, cache, **options), expected)
        cache.reset()


@families
def test_nbytes_counts_storages(pair) -> None:
    """Not less than what a full cache holds of visible tokens; far less than twice as much."""
    model, _, _, (cache, reference) = pair
    held = {}
    for layer in reference.layers:
        for tensor in tensors(vars(layer)):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    cache.reset()
    long = prompt(model, (300,))["input_ids"]
    reference = dynamic(model)
    for cached in (cache, reference):
        with torch.no_grad():
            model(long, **with_cache(cached))
    exact = sum(t.numel() * t.element_size() for t in tensors([vars(x) for x in reference.layers]))
    assert exact <= cache.nbytes <= 1.25 * exact


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


@families
def test_the_prompt_is_freed(name) -> None:
    """After a prefill no storage holds more than its own tokens, native layers included."""
    model = tiny(name)
    cache = PiKVCache(model, page_size=16, window=16)
    with torch.no_grad():
        model(prompt(model, (320,))["input_ids"], **with_cache(cache))
    for layer in cache.layers:
        held = vars(layer) if not isinstance(layer, PagedLayer) else list(layer.state.tensors())
        for tensor in tensors(held):
            own = tensor.numel() * tensor.element_size()
            assert tensor.untyped_storage().nbytes() <= own


def test_early_initialization() -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, **SMALL)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    inputs = prompt(model, ONE_ROW)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))


@functools.cache
def long_ids():
    return prompt(tiny("mixtral"), (96,))["input_ids"]


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 5, 128])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_sizes(page_size, window, step) -> None:
    """Any page size and window, tokens in any portions."""
    model = tiny("mixtral")
    ids, mask = long_ids(), torch.ones(1, 96, dtype=torch.int64)
    out = []
    for cache in (PiKVCache(model, page_size=page_size, window=window), dynamic(model)):
        parts = [
            forward(model, ids[:, begin:end], mask[:, :end], cache)
            for begin, end in chunks(96, 75, step)
        ]
        out.append(torch.cat(parts, dim=1))
    assert_close(*out)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_layer_lists_its_keys_and_values(name) -> None:
    model = tiny(name)
    ids, caches = prompt(model, (27,))["input_ids"], (dynamic(model), PiKVCache(model, **SMALL))
    for cache in caches:
        model(ids[:, :20], **with_cache(cache))
        model(ids[:, 20:], **with_cache(cache))
    for expected, layer in zip(*(cache.layers for cache in caches), strict=True):
        assert_close(layer.keys, expected.keys)
        assert_close(layer.values, expected.values)
        with pytest.raises(AttributeError, match="`keys` of a paged layer cannot be set"):
            layer.keys = expected.keys
    dropping = PiKVCache(model, scheduler="knorm", budget=12, **SMALL)
    assert dropping.layers[0].keys is None
    model(ids, **with_cache(dropping))
    with pytest.raises(RuntimeError, match="a cache that drops tokens"):
        _ = dropping.layers[0].keys
