"""Rows of a batch, beams, forks and drafted tokens: each row selects as if it was alone."""

import functools
import itertools

import pytest
import torch
from helpers import Scattered, assert_same, exact_model, forward, generate, tiny
from test_generate_modes import disturbed
from test_rules import LENGTHS, SECOND, SMALL
from tolerances import SUMS
from torch import Tensor
from watching import Watch
from zoo import prompt

from pikv_hf import ROUTERS, PiKVCache

STEPS = 4
SELECTING = [name for name in ROUTERS if name != "all"]
selecting = pytest.mark.parametrize("name", SELECTING)
# Without heads of different lengths: of these, other tokens share a page in one batch than in another.
METHODS = [
    {},
    {"scheduler": "keydiff", "budget": 0.7},
    {"scheduler": "h2o", "budget": 24, "compressor": Scattered()},
    {"compressor": "int8", "placement": "offload"},
]


def half(name: str):
    """A router that reads half of the pages, with all terms of its rule."""
    if name == "adaptive":
        return ROUTERS[name](target=0.6)
    more = {"balanced": {"alpha": 1.0}, "hierarchical": {"width": 2, "spread": 1}}
    return ROUTERS[name](fraction=0.5, **more.get(name, {}))


@functools.cache
def texts() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Two turns in padded rows, each followed by single tokens; and the passes that read them."""
    model = exact_model("mixtral")
    (first, shown), (second, more) = (prompt(model, n).values() for n in (LENGTHS, SECOND))
    single = torch.randint(3, 100, (3, 2 * STEPS), generator=torch.manual_seed(5))
    ones = torch.ones_like(single[:, :STEPS])
    ids = torch.cat([first, single[:, :STEPS], second, single[:, STEPS:]], dim=1)
    mask = torch.cat([shown, ones, more, ones], dim=1)
    ends = [first.shape[1], second.shape[1]]
    return ids, mask, ends


def read_all(cache: PiKVCache, ids: Tensor, mask: Tensor, ends: list[int]) -> Tensor:
    """The last logits [B, V] of each pass, of two turns."""
    outs, start = [], 0
    for prompt_length in ends:
        for length in (prompt_length, *[1] * STEPS):
            end = start + length
            out = forward(cache.model, ids[:, start:end], mask[:, :end], cache)
            outs.append(out[:, -1])
            start = end
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        *((name, {}) for name in SELECTING),
        *zip(SELECTING, itertools.cycle(METHODS[1:]), strict=False),
    ],
    ids=str,
)
def test_a_row_reads_what_it_reads_alone(name, methods, monkeypatch) -> None:
    """With padding on the left, and in the middle of the text in a second turn."""
    model, watch = exact_model("mixtral"), Watch(monkeypatch)
    ids, mask, ends = texts()
    cache = PiKVCache(model, router=half(name), **methods, **SMALL)
    batch = read_all(cache, ids, mask, ends)
    reads = watch.reads.copy()
    assert sum(len(read.pages) < len(read.held) for read in reads) > len(reads) / 2
    for row in range(len(ids)):
        watch.reads.clear()
        own = ids[row : row + 1, mask[row].bool()]
        cache = PiKVCache(model, router=half(name), **methods, **SMALL)
        alone = read_all(cache, own, torch.ones_like(own), [LENGTHS[row], SECOND[row]])
        assert (batch[row] - alone[0]).abs().max() <= SUMS
        ours = {(r.layer, r.head, r.position): r.pages for r in reads if r.row == row}
        theirs = {(r.layer, r.head, r.position): r.pages for r in watch.reads}
        assert ours == theirs


@selecting
def test_a_row_generates_what_it_generates_alone(name) -> None:
    model = exact_model("deepseek_v3")
    inputs = prompt(model, LENGTHS)
    batch = generate(model, inputs, PiKVCache(model, router=half(name), **SMALL), max_new_tokens=6)
    row, length = 1, LENGTHS[1]
    alone = {key: tensor[row : row + 1, -length:] for key, tensor in inputs.items()}
    expected = generate(
        model, alone, PiKVCache(model, router=half(name), **SMALL), max_new_tokens=6
    )
    assert torch.equal(batch.tokens[row, -6:], expected.tokens[0, -6:])
    assert (batch.logits[:, row] - expected.logits[:, 0]).abs().max() <= SUMS


@selecting
def test_forks_and_rows_of_a_cache_continue(name) -> None:
    """A fork as the original does; rows in another order, and chosen rows, as before."""
    model = exact_model("mixtral")
    ids, mask, (start, _) = texts()
    options = METHODS[SELECTING.index(name) % len(METHODS)]
    cache = PiKVCache(model, router=half(name), **options, **SMALL)
    forward(model, ids[:, :start], mask[:, :start], cache)
    step = functools.partial(single_tokens, model, ids, mask)
    step(cache, start, start + 2)
    twice, turned, fewer = cache.fork(2), cache.fork(), cache.fork()
    rows, some = torch.tensor([2, 0, 1]), torch.tensor([1, 2])
    turned.reorder_cache(rows)
    fewer.batch_select_indices(some)
    each = rows.new_tensor([0, 0, 1, 1, 2, 2])
    expected = step(cache, start + 2, start + STEPS)
    for other, index in ((twice, each), (turned, rows), (fewer, some)):
        actual = step(other, start + 2, start + STEPS, index)
        assert (actual - expected[index]).abs().max() <= SUMS


def single_tokens(model, ids, mask, cache, start: int, end: int, rows=None) -> Tensor:
    rows = torch.arange(len(ids)) if rows is None else rows
    outs = [
        forward(model, ids[rows, i : i + 1], mask[rows, : i + 1], cache) for i in range(start, end)
    ]
    return torch.cat(outs, dim=1)


def drafts(model, parts: int) -> dict:
    """A prompt that repeats itself, and what drafts by it."""
    part = prompt(model, (24,), seed=7)["input_ids"]
    ids = torch.cat([part] * parts, dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


STATELESS = [name for name in SELECTING if name not in ("balanced", "cache_aware", "pikv")]


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
def test_drafted_tokens_select_apart(name, mode, monkeypatch) -> None:
    """Each as if it was generated alone: the same tokens, as no page is sealed meanwhile."""
    model, watch = tiny("mixtral"), Watch(monkeypatch)
    options = {"page_size": 16, "window": 4, "router": half(name)}
    drafter = {"prompt_lookup_num_tokens": 3}
    if mode == "assistant":
        drafter = {"assistant_model": disturbed("mixtral")}
    inputs, count = drafts(model, 5), {"max_new_tokens": 15}
    expected = generate(model, inputs, PiKVCache(model, **options), **count)
    plain = {(r.layer, r.head, r.position): r.pages for r in watch.reads}
    watch.reads.clear()
    actual = generate(model, inputs, PiKVCache(model, **options), **count, **drafter)
    if name not in ("topk", "entropy"):  # the first layer has the experts of the token before
        assert_same(actual, expected)
        newest = {(r.layer, r.head, r.position): r.pages for r in watch.reads}
        assert all(newest[key] == pages for key, pages in plain.items() if key in newest)
    positions = [(r.layer, r.head, r.position) for r in watch.reads]
    assert len(positions) > len(set(positions)) > 0, "no drafted token was rejected"


@selecting
def test_drafted_tokens_by_the_formula(name, monkeypatch) -> None:
    """While pages are sealed in between, and the averages of a router change."""
    model, watch = exact_model("mixtral"), Watch(monkeypatch, name, SUMS)
    watch.check_attention(monkeypatch, SUMS)
    cache = PiKVCache(model, router=half(name), page_size=2, window=4)
    generate(model, drafts(model, 2), cache, max_new_tokens=16, prompt_lookup_num_tokens=3)
    assert watch.checked > len(watch.reads) / 2


@selecting
def test_beams_by_the_formula(name, monkeypatch) -> None:
    """Beams share pages and select apart; each has the averages of the beam that it continues."""
    model, watch = exact_model("mixtral"), Watch(monkeypatch, name, SUMS)
    reorder = PiKVCache.reorder_cache

    def reordered(cache: PiKVCache, rows: Tensor) -> None:
        reorder(cache, rows)
        watch.reorder(rows.tolist())

    monkeypatch.setattr(PiKVCache, "reorder_cache", reordered)
    cache = PiKVCache(model, router=half(name), **SMALL)
    inputs = prompt(model, LENGTHS[1:])
    generate(model, inputs, cache, num_beams=3, max_new_tokens=7)
    assert watch.checked > len(watch.reads) / 2
