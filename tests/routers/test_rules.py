"""Every rule reads the pages that its formula says, in each row and KV head, and no others."""

import itertools

import pytest
import torch
from helpers import Scattered, exact_model, forward, paged
from tolerances import FLOAT64, SUMS
from watching import Watch, name_of
from zoo import prompt

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.placements import Offload
from pikv_hf.routers import (
    Adaptive,
    Balanced,
    CacheAware,
    Clusters,
    Entropy,
    Hash,
    Hierarchical,
    Oracle,
    PiKVRouter,
    Quest,
    RandomPages,
    RoundRobin,
    TopK,
)

LENGTHS, SECOND = (57, 45, 34), (7, 3, 5)
SMALL = {"page_size": 4, "window": 4}
ROUTERS_HERE = [
    RandomPages(seed=3),
    Hash(seed=2, buckets=3),
    RoundRobin(buckets=3, fraction=0.4),
    Quest(),
    Quest(top_p=0.6),
    Adaptive(target=0.8),
    Hierarchical(width=2, spread=1, fraction=0.3),
    Hierarchical(width=3, spread=2, top_pages=3),
    Clusters(centroids=3),
    Clusters(top_p=0.5),
    TopK(),
    TopK(experts_from="previous_token", top_p=0.6),
    Balanced(alpha=0.5),
    CacheAware(penalty=0.5),
    Entropy(beta=0.5),
    PiKVRouter(fraction=0.4),
    Oracle(),
    Oracle(top_p=0.7),
]
STORAGE = {
    "plain": {},
    "int8": {"compressor": "int8"},
    "keydiff": {"scheduler": "keydiff", "budget": 0.7},
    "adakv": {"scheduler": "adakv", "budget": 0.7},
    "mixed": {"compressor": Scattered()},
    "offload": {"placement": Offload(20_000)},
    "all": {"scheduler": "adakv", "budget": 0.7, "compressor": Scattered()},
}
CASES = list(zip(ROUTERS_HERE, itertools.cycle(list(STORAGE)[1:]), strict=False))


def read_two_turns(model, cache, lengths=LENGTHS, second=SECOND, steps: int = 4) -> None:
    """A padded prompt and single tokens, then a turn with padding in the middle, and more tokens."""
    ids, mask = prompt(model, lengths).values()
    forward(model, ids, mask, cache)
    more = torch.randint(3, 100, (len(lengths), 2 * steps), generator=torch.manual_seed(5))
    for turn in range(2):
        for step in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(lengths), 1)], dim=1)
            at = turn * steps + step
            forward(model, more[:, at : at + 1], mask, cache)
        if not turn:
            ids, new = prompt(model, second, seed=1).values()
            mask = torch.cat([mask, new], dim=1)
            forward(model, ids, mask, cache)


def assert_by_formula(model, router, options, monkeypatch) -> Watch:
    watch = Watch(monkeypatch, name_of(router), SUMS)
    watch.check_attention(monkeypatch, FLOAT64 if router_is_exact(options) else SUMS)
    cache = PiKVCache(model, router=router, **options, **SMALL)
    read_two_turns(model, cache)
    assert paged(cache)
    assert watch.checked > len(watch.reads) / 4, "most queries read all pages"
    assert watch.attended >= watch.checked
    return watch


def router_is_exact(options: dict) -> bool:
    return "compressor" not in options


@pytest.mark.parametrize("router", ROUTERS_HERE, ids=str)
def test_pages_by_the_formula(router, monkeypatch) -> None:
    assert_by_formula(exact_model("mixtral"), router, {}, monkeypatch)


@pytest.mark.parametrize(("router", "storage"), CASES, ids=str)
def test_pages_by_the_formula_in_other_stores(router, storage, monkeypatch) -> None:
    assert_by_formula(exact_model("mixtral"), router, STORAGE[storage], monkeypatch)


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("deepseek_v3", Quest()),
        ("deepseek_v3", Clusters()),
        ("deepseek_v3", PiKVRouter(alpha=0.5)),
        ("gpt_oss", Hierarchical(width=2, spread=1)),
        ("gpt_oss", Entropy()),
    ],
    ids=str,
)
def test_pages_by_the_formula_in_other_models(name, router, monkeypatch) -> None:
    """Latents of which the first layer has no gate, and attention sinks."""
    assert_by_formula(exact_model(name), router, {}, monkeypatch)


def test_all_rules_are_here() -> None:
    assert {name_of(router) for router in ROUTERS_HERE} == set(ROUTERS) - {"all"}
