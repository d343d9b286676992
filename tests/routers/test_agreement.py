"""PiKV's terms: which of them change nothing, and what loads and misses do to reads."""

import dataclasses

import pytest
import torch
from helpers import SMALL, exact_model, tiny
from test_rules import read_two_turns
from tolerances import FLOAT32, FLOAT64
from torch import Tensor
from watching import Watch

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.placements import Offload
from pikv_hf.routers import (
    Agreement,
    Balanced,
    CacheAware,
    Entropy,
    Pages,
    PiKVRouter,
    Query,
    TopK,
)

EXPERTS, PAGES, READ = 8, 64, 8


def reads_of(router, monkeypatch, **options) -> set:
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        cache = PiKVCache(exact_model("mixtral"), router=router, **options, **SMALL)
        read_two_turns(exact_model("mixtral"), cache)
    assert any(len(read.pages) < len(read.held) for read in watch.reads)
    return set(watch.reads)


@pytest.mark.parametrize(
    "router",
    [Balanced(alpha=0), CacheAware(penalty=9), Entropy(beta=0), PiKVRouter(bound=0, penalty=0)],
    ids=str,
)
def test_terms_that_change_nothing(router, monkeypatch) -> None:
    """Without a weight, and without far pages: the reads of topk."""
    assert reads_of(router, monkeypatch) == reads_of(TopK(), monkeypatch)


@pytest.mark.parametrize(
    "router",
    [Balanced(alpha=5), Entropy(beta=5), PiKVRouter(), TopK(experts_from="previous_token")],
    ids=str,
)
def test_terms_that_change_reads(router, monkeypatch) -> None:
    assert reads_of(router, monkeypatch) != reads_of(TopK(), monkeypatch)


def test_far_pages_change_the_reads_of_cache_aware(monkeypatch) -> None:
    far = {"placement": Offload(20_000)}
    aware = reads_of(CacheAware(penalty=9), monkeypatch, **far)
    assert aware != reads_of(TopK(), monkeypatch, **far)
    assert reads_of(TopK(), monkeypatch, **far) == reads_of(TopK(), monkeypatch)


@pytest.mark.parametrize(("name", "field"), [("cache_aware", "penalty"), ("balanced", "alpha")])
def test_defaults(name, field) -> None:
    """Only the term of the name has a weight."""
    router = ROUTERS[name]()
    assert getattr(router, field) > 0
    weights = dataclasses.asdict(router) | {field: 0.0}
    assert [k for k in ("alpha", "penalty", "beta", "bound") if weights[k]] == []


# ---- constructed pages: each of one expert, or of two -------------------------------------------


def store(router: Agreement, experts: Tensor) -> Pages:
    """Pages [1, 1, M] of 4 tokens of the experts [M, 2], of which the first has more weight."""
    weights = torch.tensor([0.8, 0.2]).expand(1, 1, len(experts), 4, 2)
    known = {"experts": experts[None, None, :, None].expand_as(weights), "weights": weights}
    digests = router.digest(torch.zeros(1, 1, len(experts), 4, 2), known, EXPERTS)
    numbers = torch.arange(len(experts)).view(1, 1, -1)
    return Pages(
        router.prepared(digests, torch.ones_like(numbers, dtype=torch.bool)),
        numbers,
        lambda: torch.zeros(0),
    )


def simulated(router: Agreement, stores: list[Pages], far: Pages | None = None) -> Tensor:
    """How often each page was read by 300 queries whose expert is 0, 1, 2 or 3, mostly 0."""
    draw, state = torch.Generator().manual_seed(0), None
    total = torch.zeros(sum(pages.numbers.shape[2] for pages in stores))
    for _ in range(300):
        first = torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), 1, generator=draw)
        other = torch.randint(EXPERTS, (1,), generator=draw)
        query = Query(
            states=torch.zeros(1, 1, 1, 1, 2),
            scale=1.0,
            positions=lambda: torch.zeros(1, 1, dtype=torch.int64),
            layer_idx=0,
            max_pages=READ,
            experts=torch.stack([first, other], dim=1)[None],
            weights=torch.tensor([[[0.6, 0.4]]]),
            state=state,
        )
        scores = torch.cat([router.scores(query, pages) for pages in stores], dim=-1)
        index = scores[0, 0, 0, 0].topk(READ).indices
        counts = torch.zeros(1, 1, len(total)).index_fill_(2, index, 1.0)
        parts = counts.split([pages.numbers.shape[2] for pages in stores], dim=2)
        read = [
            (pages, part, part if pages is far else torch.zeros_like(part))
            for pages, part in zip(stores, parts, strict=True)
        ]
        state = router.updated(query, read)
        total += counts[0, 0]
    return total


def drawn() -> Tensor:
    """The experts [M, 2] of pages: the first is each expert equally often."""
    draw = torch.Generator().manual_seed(1)
    first = torch.arange(PAGES) % EXPERTS
    other = (first + torch.randint(1, EXPERTS, (PAGES,), generator=draw)) % EXPERTS
    return torch.stack([first, other], dim=1)


def test_imbalance_falls_as_alpha_rises() -> None:
    experts, spreads = drawn(), []
    for alpha in (0.0, 0.05, 0.2, 1.0):
        router = Balanced(alpha=alpha)
        read = simulated(router, [store(router, experts)])
        of_bucket = torch.zeros(EXPERTS).index_add_(0, experts[:, 0], read)
        spreads.append(float(of_bucket.std() / of_bucket.mean()))
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0] / 4


def test_fewer_far_pages_are_read_as_the_penalty_rises() -> None:
    """The pages of half of the experts are far, those of the most frequent one too."""
    experts, fetched = drawn(), []
    is_far = experts[:, 0] % 2 == 0
    for penalty in (0.0, 0.05, 0.2, 1.0):
        router = CacheAware(penalty=penalty)
        near, far = store(router, experts[~is_far]), store(router, experts[is_far])
        read = simulated(router, [near, far], far)
        fetched.append(float(read[int((~is_far).sum()) :].sum()))
    assert fetched == sorted(fetched, reverse=True)
    assert fetched[-1] < fetched[0] / 2


def test_averages_begin_at_an_even_load_and_no_miss() -> None:
    router = PiKVRouter(alpha=1.0)
    pages = store(router, torch.tensor([[0, 1], [0, 1], [3, 2]]))
    states = torch.zeros(1, 1, 1, 1, 2)
    query = Query(states, 1.0, lambda: torch.zeros(1, 1, dtype=torch.int64), 0, 3)
    counts = torch.tensor([[[1.0, 1.0, 2.0]]])
    loads, misses = router.updated(query, [(pages, counts, counts)])[0]
    expected = torch.full((EXPERTS,), 0.9)
    expected[0] += 0.1 * 2 / 0.5
    expected[3] += 0.1 * 2 / 0.5
    assert (loads - expected).abs().max() <= FLOAT32
    assert abs(float(loads.mean()) - 1) <= FLOAT32
    assert (misses[[0, 3]] - 0.2).abs().max() <= FLOAT32 and misses.sum() <= 0.4 + FLOAT32


def test_loads_are_counted_where_all_pages_are_read() -> None:
    """As in a batch with a longer row, which does not read all."""
    cache = PiKVCache(tiny("mixtral"), router=Balanced(top_pages=99), **SMALL)
    read_two_turns(tiny("mixtral"), cache, steps=2)
    for layer in cache.layers:
        loads = layer.state.routing.state[:, 0].double()
        assert (loads.mean(-1) - 1).abs().max() <= FLOAT32 + FLOAT64
        assert (loads.std(-1) > 0).all()
