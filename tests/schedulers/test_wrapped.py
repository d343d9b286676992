"""What a scheduler has besides its scores counts within others, or they refuse it."""

import pytest
from helpers import paged, tiny
from test_schedulers import kept
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import (
    H2O,
    AdaKV,
    ChunkKV,
    CriticalKV,
    ExpectedAttention,
    Expert,
    PiKVAdaKV,
    PyramidKV,
    SnapKV,
)

SIZES = {"page_size": 1, "window": 4, "budget": 20}


def after(model, scheduler) -> list[list[set[int]]]:
    """The sealed positions of a row of 60 tokens that is read beside a shorter one: [layer][head]."""
    inputs = prompt(model, (60, 47))
    with PiKVCache(model, scheduler=scheduler, **SIZES) as cache:
        model(**inputs, **with_cache(cache))
        assert paged(cache)
        return kept(cache, 0)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda h2o: h2o,
        PyramidKV,
        AdaKV,
        PiKVAdaKV,
        lambda h2o: ChunkKV(h2o, chunk_length=3),
        CriticalKV,
        Expert,
        lambda h2o: AdaKV(CriticalKV(h2o)),
        lambda h2o: PyramidKV(AdaKV(Expert(h2o))),
    ],
)
def test_recent_tokens_of_h2o_stay(name, wrap) -> None:
    """With a ratio of 1 the newest ones alone, in every head."""
    model = tiny(name)
    for heads in after(model, wrap(H2O(recent_ratio=1.0))):
        for head in heads:
            assert head == set(range(56 - len(head), 56))
    others = after(model, wrap(H2O(recent_ratio=0.0)))
    assert any(min(head, default=59) < 30 for heads in others for head in heads)


def test_terms_of_experts_alone_protect_nothing() -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    alone = Expert(H2O(recent_ratio=1.0), weight=0.0)
    assert after(model, alone) == after(model, Expert(H2O(recent_ratio=0.0), weight=0.0))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        (PiKVAdaKV(SnapKV(window_size=2), window_size=32), SnapKV(window_size=2)),
        (PiKVAdaKV(ExpectedAttention(window_size=8)), ExpectedAttention(window_size=8)),
        (PiKVAdaKV(CriticalKV(epsilon=1.0)), CriticalKV(epsilon=1.0)),
        (AdaKV(PyramidKV(CriticalKV())), AdaKV(CriticalKV())),
        (PyramidKV(AdaKV(CriticalKV())), AdaKV(CriticalKV())),
    ],
    ids=str,
)
def test_the_same_as_the_scorer(name, wrapped, plain) -> None:
    """One layer has the whole budget, and theta is 1 at first: the scorer decides as it does alone."""
    model = tiny(name, num_hidden_layers=1)
    assert after(model, wrapped) == after(model, plain)


@pytest.mark.parametrize("wrap", [ChunkKV, CriticalKV, Expert, AdaKV, PiKVAdaKV])
def test_what_cannot_be_applied_is_refused(wrap) -> None:
    with pytest.raises(ValueError, match=r"`scorer` is PiKVAdaKV\("):
        wrap(PiKVAdaKV())
