"""What routers refuse: one sentence that names the argument, the value and what is accepted."""

import pytest
import torch
from helpers import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.routers import (
    Adaptive,
    Clusters,
    Hash,
    Hierarchical,
    Pages,
    PiKVRouter,
    Query,
    Quest,
    RandomPages,
    TopK,
)

SELECTING = {name: method for name, method in ROUTERS.items() if name != "all"}
SIZES = [
    ({"top_pages": 0}, "`top_pages` is 0; it must be a positive whole number"),
    ({"top_pages": -2}, "`top_pages` is -2; it must be a positive whole number"),
    ({"top_pages": 2.5}, "`top_pages` is 2.5; it must be a positive whole number"),
    ({"top_pages": True}, "`top_pages` is True; it must be a positive whole number"),
    ({"fraction": 0}, r"`fraction` is 0; it must be a number in \(0, "),
    ({"fraction": -0.5}, r"`fraction` is -0.5; it must be a number in \(0, "),
    ({"fraction": 1.5}, r"`fraction` is 1.5; it must be a number in \(0, 1\]"),
    ({"fraction": float("nan")}, r"`fraction` is nan; it must be a number in \(0, "),
    ({"fraction": "half"}, r"`fraction` is 'half'; it must be a number in \(0, "),
    ({"top_p": 0.0}, r"`top_p` is 0.0; it must be a number in \(0, "),
    ({"top_p": 2}, r"`top_p` is 2; it must be a number in \(0, 1\]"),
    ({"read_bytes": "x"}, "`read_bytes` is 'x'; it must be a number of bytes, 1 or more, or text"),
    ({"read_bytes": 0}, "`read_bytes` is 0; it must be a number of bytes, 1 or more, or text"),
    ({"read_bytes": 1.5}, "`read_bytes` is 1.5; it must be a number of bytes, 1 or more, or text"),
]
BOTH = {"top_pages": 4, "fraction": 0.5}
OTHERS = [
    (TopK, {"experts_from": "next_layer"}, "'next_layer'; it must be one of .*previous_token"),
    (TopK, {"agreement": -1}, "-1; it must be a number, 0 or more"),
    (PiKVRouter, {"alpha": -0.1}, "-0.1; it must be a number, 0 or more"),
    (PiKVRouter, {"penalty": float("inf")}, "inf; it must be a number"),
    (PiKVRouter, {"beta": "much"}, "'much'; it must be a number, 0 or more"),
    (PiKVRouter, {"bound": None}, "None; it must be a number, 0 or more"),
    (RandomPages, {"seed": -1}, "-1; it must be a whole number, 0 or more"),
    (RandomPages, {"seed": 2**63}, f"{2**63}; it must be a whole number, 0 or more and below"),
    (Hash, {"seed": 2**64}, f"{2**64}; it must be a whole number, 0 or more and below"),
    (RandomPages, {"seed": 0.5}, "0.5; it must be a whole number"),
    (Hash, {"buckets": 0}, "0; it must be a positive whole number"),
    (Hash, {"seed": "a"}, "'a'; it must be a whole number"),
    (Hierarchical, {"width": 0}, "0; it must be a positive whole number"),
    (Hierarchical, {"spread": 1.5}, "1.5; it must be a positive whole number"),
    (Clusters, {"centroids": 0}, "0; it must be a positive whole number"),
    (Adaptive, {"target": 0}, r"0; it must be a number in \(0, "),
    (Adaptive, {"target": 1.01}, r"1.01; it must be a number in \(0, 1\]"),
]


@pytest.mark.parametrize(("size", "text"), SIZES, ids=str)
def test_sizes(size, text) -> None:
    for method in SELECTING.values():
        if method is not Adaptive:
            with pytest.raises(ValueError, match=text) as raised:
                method(**size)
            assert_one_sentence(raised)


@pytest.mark.parametrize(("method", "wrong", "text"), OTHERS, ids=str)
def test_own_arguments(method, wrong, text) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is {text}") as raised:
        method(**wrong)
    assert_one_sentence(raised)


def assert_one_sentence(raised) -> None:
    text = str(raised.value)
    assert text.endswith(".") and "\n" not in text


def test_one_size_only() -> None:
    for method in SELECTING.values():
        if method is not Adaptive:
            with pytest.raises(
                ValueError, match="`top_pages` is 4 and `fraction` is 0.5; .* one of"
            ):
                method(**BOTH)
    with pytest.raises(ValueError, match="`fraction` is 0.5, but `target` decides"):
        Adaptive(fraction=0.5)


@pytest.mark.parametrize("size", [{"fraction": 1}, {"top_p": 1}, {"read_bytes": "1 GiB"}], ids=str)
def test_what_is_accepted(size) -> None:
    for method in SELECTING.values():
        if method is not Adaptive:
            PiKVCache(tiny("mixtral"), router=method(**size))
    assert Adaptive(target=1).top_p == 1


@pytest.mark.parametrize("method", [RandomPages, Hash])
def test_all_seeds_that_are_accepted_differ(method) -> None:
    """Among 64 pages, up to the largest seed."""
    numbers = torch.arange(64).view(1, 1, -1)
    query = Query(torch.zeros(1, 1, 1, 1, 2), 1.0, lambda: torch.zeros(1, 1).long(), 0, 1)
    pages = Pages({}, numbers, lambda: torch.zeros(0))
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**63 - 1]
    scores = {tuple(method(seed=seed).scores(query, pages).flatten().tolist()) for seed in seeds}
    assert len(scores) == len(seeds)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("qest", "quest"), ("top_k", "topk"), ("round-robin", "round_robin"), ("cluster", "clusters")],
)
def test_the_nearest_name_is_suggested(wrong, near) -> None:
    with pytest.raises(ValueError, match=rf"`router` is '{wrong}'.*Did you mean '{near}'"):
        PiKVCache(tiny("mixtral"), router=wrong)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()


@pytest.mark.parametrize("name", ["topk", "balanced", "cache_aware", "entropy", "pikv"])
def test_experts_of_a_dense_model(name, dense) -> None:
    """Refused when the cache is made; routers that need no gate are accepted."""
    with pytest.raises(ValueError, match=r"`router` is \w+\(.*gates.*LlamaForCausalLM") as raised:
        PiKVCache(dense, router=name)
    assert_one_sentence(raised)


def test_other_routers_on_a_dense_model(dense) -> None:
    for name in ("quest", "adaptive", "hierarchical", "clusters", "random", "oracle"):
        PiKVCache(dense, router=name)
    assert Quest() == Quest()
