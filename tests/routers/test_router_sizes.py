"""How many pages are read: by each size, over all stores, and which are read in any case."""

import itertools
import math

import pytest
import torch
from helpers import SMALL, exact_model, generate, paged, slabs_of
from test_all_pages import STORAGE
from test_rules import read_two_turns
from watching import Watch, pages_of
from zoo import prompt

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.routers import PageRouter, Quest, TopK

SELECTING = [name for name in ROUTERS if name != "all"]
storages = pytest.mark.parametrize("storage", ["plain", "int8", "adakv", "mixed"])


def read_by(router: PageRouter, options: dict, monkeypatch) -> list:
    """What queries read in two turns."""
    watch = Watch(monkeypatch)
    read_two_turns(exact_model("mixtral"), cache_of(router, options), steps=3)
    assert watch.reads
    return watch.reads


def cache_of(router: PageRouter, options: dict) -> PiKVCache:
    return PiKVCache(exact_model("mixtral"), router=router, **options, **SMALL)


@pytest.mark.parametrize(
    ("name", "storage"), list(zip(SELECTING, itertools.cycle(["plain", "adakv", "mixed"])))
)
def test_one_page_is_the_first(name, storage, monkeypatch) -> None:
    """With the sink, beside pages that are not full; the tail is read, too (test_rules.py)."""
    size = {"target": 1e-9} if name == "adaptive" else {"top_pages": 1}
    for read in read_by(ROUTERS[name](**size), STORAGE[storage], monkeypatch):
        held = max(map(len, read.held), default=0)
        first = {page for page in read.held if page[0] == 0}
        assert first <= read.pages
        others = read.pages - first
        assert all(len(page) < held for page in others), "a full page that is not the first"
        if len(first) == 0:
            assert len([page for page in others if len(page) == held]) <= 1


@storages
@pytest.mark.parametrize("top_pages", [3, 1000])
def test_top_pages(storage, top_pages, monkeypatch) -> None:
    assert_counts(Quest(top_pages=top_pages), storage, monkeypatch, lambda n: min(n, top_pages))


@storages
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_fraction_is_rounded_up(storage, fraction, monkeypatch) -> None:
    percent = round(100 * fraction)
    assert_counts(TopK(fraction=fraction), storage, monkeypatch, lambda n: -(-percent * n // 100))


def assert_counts(router, storage, monkeypatch, wanted) -> None:
    """Of each head, so many full pages are read, and all others."""
    watch = Watch(monkeypatch)
    read_two_turns(exact_model("mixtral"), cache_of(router, STORAGE[storage]), steps=3)
    for pages, read in watch.counted:
        held = [page for page in pages if page.is_full]
        found = [page for page in read if page.is_full]
        assert len(found) == wanted(len(held))
        assert len(read) - len(found) == len(pages) - len(held)
    assert {len(pages) for pages, _ in watch.counted} - {0, 1}


@pytest.mark.parametrize("storage", ["plain", "int8", "ram"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_read_bytes_of_a_row_over_all_layers(name, storage) -> None:
    """As many pages as fit: with one more of each head of each layer they would not."""
    model = exact_model(name)
    inputs = prompt(model, (60, 51))
    cache = PiKVCache(model, **STORAGE[storage], **SMALL)
    generate(model, inputs, cache, max_new_tokens=2)
    sizes = [slabs_of(layer)[0].page_bytes for layer in paged(cache)]
    step = sum(sizes) * paged(cache)[0].state.tail.keys.shape[1]
    for pages in (1.01, 2, 4.99):
        router = Quest(read_bytes=math.ceil(pages * step))
        cache = PiKVCache(model, router=router, **STORAGE[storage], **SMALL)
        generate(model, inputs, cache, max_new_tokens=2)
        used = 0
        for layer, page_bytes in zip(paged(cache), sizes, strict=True):
            used += sum(read.pages for read in layer.state.routing.reads) * page_bytes
        assert used == 2 * math.floor(pages) * step


def test_read_bytes_as_text() -> None:
    assert Quest(read_bytes="2 KiB") != Quest(read_bytes=2048)
    full, kib = torch.tensor([[9]]), 1024
    counts = [Quest(read_bytes=size).counts(full, 1, 300) for size in ("2 KiB", 2 * kib)]
    assert counts == [6, 6]


def test_read_bytes_for_less_than_a_page(monkeypatch) -> None:
    """The first page is read all the same."""
    for read in read_by(Quest(read_bytes=1), {}, monkeypatch):
        assert {page[0] for page in read.pages} <= {0}


def test_more_sinks_take_more_pages(monkeypatch) -> None:
    options = {"scheduler": "keydiff", "budget": 0.7, "sinks": 6}
    for read in read_by(Quest(top_pages=1), options, monkeypatch):
        sinks = {page for page in read.held if page[0] < 6}
        assert sinks <= read.pages and (len(sinks) == 2 or not read.held)
        largest = max(map(len, read.held), default=0)
        assert all(len(page) < largest for page in read.pages - sinks)


def test_a_quarter_is_the_default(monkeypatch) -> None:
    assert_counts(Quest(), "plain", monkeypatch, lambda n: math.ceil(n / 4))


def test_pages_of_no_row(monkeypatch) -> None:
    """A row of which nothing is sealed yet reads its tail alone."""
    model, watch = exact_model("mixtral"), Watch(monkeypatch)
    cache = cache_of(Quest(top_pages=1), {})
    read_two_turns(model, cache, lengths=(40, 3, 2), second=(4, 2, 1), steps=2)
    assert not any(read.held for read in watch.reads if read.row == 2)
    assert any(read.held for read in watch.reads if read.row == 0)
    assert all(pages_of(paged(cache)[0].state, 0))


@pytest.mark.parametrize(("percent", "pages"), [(10, 30), (7, 100), (29, 100), (30, 10)])
def test_a_fraction_of_pages_has_no_error_of_rounding(percent, pages) -> None:
    """0.07 * 100 is 7.000000000000001 as a float number."""
    counts = Quest(fraction=percent / 100).counts(torch.tensor([[pages]]), 1, 1)
    assert counts.tolist() == [[percent * pages // 100]]
