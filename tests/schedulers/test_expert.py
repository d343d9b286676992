"""Scores from the model's gate: against plain Python, in a model, and beside a scorer."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import SMALL, forward, paged, tail_labels, tiny
from test_methods import Witness
from test_schedulers import OPEN, kept
from tolerances import FLOAT32, SUMS
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import AdaKV, Candidates, Expert, KeyDiff, Knorm, SnapKV, StreamingLLM
from pikv_hf.schedulers.expert import TERMS, expert_term, ranks

BUDGET = 20
OFF = dict.fromkeys(TERMS, 0.0)


def only(term: str, scorer=None, **options) -> Expert:
    return Expert(scorer or Knorm(), **(OFF | {"weight": 0.0, term: 1.0} | options))


def plain_term(name, experts, weights, open_experts, open_weights) -> list[float]:
    """A term of tokens with lists of k `experts` and `weights` each, as the docs say it."""

    def shares(row):
        total = sum(row)
        return [w / total for w in row]

    if name == "confidence":
        return [max(row) for row in weights]
    if name == "spread":
        return [-sum(p * math.log(p) for p in shares(row) if p) for row in weights]
    load: dict[int, float] = {}
    if name == "popularity":
        for chosen in experts:
            for expert in chosen:
                load[expert] = load.get(expert, 0) + 1
    else:
        for chosen, row in zip(open_experts, open_weights, strict=True):
            for expert, share in zip(chosen, shares(row), strict=True):
                load[expert] = load.get(expert, 0) + share
    return [
        sum(load.get(e, 0) * p for e, p in zip(chosen, shares(row), strict=True))
        for chosen, row in zip(experts, weights, strict=True)
    ]


def plain_ranks(scores: list[float]) -> list[float]:
    lower = [sum(other < own for other in scores) for own in scores]
    equal = [sum(other == own for other in scores) for own in scores]
    return [(a + b / 2) / len(scores) for a, b in zip(lower, equal, strict=True)]


def drawn(seed: int, heads: int, ragged: bool) -> Candidates:
    """Two rows with three KV heads: labels of each head, or the same in all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def chosen(*shape):
        return normal(*shape, 9).argsort(-1)[..., :4].to(torch.int16)

    valid = None
    if ragged:
        lengths = torch.randint(5, 31, (2, 3, 1), generator=generator)
        valid = torch.arange(30) >= 30 - lengths
    keys = normal(2, 3, 30, 8)
    return Candidates(
        positions=torch.arange(30).expand(2, 3, -1),
        keys=keys,
        values=keys,
        open_keys=normal(2, 3, 7, 8),
        seen=37,
        valid=valid,
        experts=chosen(2, heads, 30),
        weights=3 * torch.rand(2, heads, 30, 4, generator=generator),
        open_experts=chosen(2, 1, 7),
        open_weights=torch.rand(2, 1, 7, 4, generator=generator),
    )


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("heads", "ragged"), [(1, False), (3, False), (3, True), (1, True)])
def test_terms(term, heads, ragged) -> None:
    """Every term of every token, and its rank beside the scorer's, as plain Python counts them."""
    tokens = drawn(3, heads, ragged)
    scheduler = only(term, Knorm(), weight=0.7, **{term: -0.4})
    found = expert_term(term, tokens).expand(2, 3, -1)
    scores, norms = scheduler.scores(tokens), Knorm().scores(tokens)
    for row in range(2):
        for head in range(3):
            count = 30 if tokens.valid is None else int(tokens.valid[row, head].sum())
            mine = head if heads > 1 else 0
            labels = [t[row, mine, -count:].tolist() for t in (tokens.experts, tokens.weights)]
            opened = [t[row, 0].tolist() for t in (tokens.open_experts, tokens.open_weights)]
            expected = plain_term(term, *labels, *opened)
            assert found[row, head, -count:].tolist() == pytest.approx(expected, rel=SUMS)
            ranked = zip(
                plain_ranks(norms[row, head, -count:].tolist()),
                plain_ranks(found[row, head, -count:].tolist()),
                strict=True,
            )
            both = [0.7 * a - 0.4 * b for a, b in ranked]
            assert scores[row, head, -count:].tolist() == pytest.approx(both, abs=SUMS)


def test_ranks_know_no_scale_and_keep_ties() -> None:
    scores = torch.tensor([[[5.0, 1.0, 1.0, -torch.inf, 1e30, 2.0, 1.0]]])
    assert ranks(scores, None)[0, 0].tolist() == pytest.approx(
        plain_ranks(scores[0, 0].tolist()), abs=FLOAT32
    )
    assert torch.equal(ranks(scores * 1e-3, None), ranks(scores, None))


def test_gates_that_say_nothing() -> None:
    """Weights of zero, or of one expert: no token stands out, and nothing is NaN."""
    tokens = drawn(1, 1, False)
    silent = replace(tokens, weights=torch.zeros_like(tokens.weights))
    assert expert_term("agreement", silent).isfinite().all()
    assert len(expert_term("spread", silent).unique()) == 1
    one = replace(tokens, experts=tokens.experts[..., :1], weights=tokens.weights[..., :1])
    assert (expert_term("spread", one) == 0).all()
    half = replace(tokens, weights=tokens.weights.bfloat16())
    assert only("agreement").scores(half).dtype == torch.float32


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("lengths", [(50,), (50, 41, 33)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("term", TERMS)
def test_kept_set(name, lengths, term) -> None:
    """In a model, by what its gates return to a hook of our own; every row as if it were alone."""
    model = build(name)
    inputs = prompt(model, lengths)
    witness = Witness(model)
    cache = PiKVCache(model, scheduler=only(term), budget=BUDGET, page_size=1, window=OPEN)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    top_k = tail_labels(paged(cache)[0])["experts"].shape[-1]
    for row, length in enumerate(lengths):
        pad = 50 - length
        for layer, heads in zip(paged(cache), kept(cache, row), strict=True):
            experts, weights = witness.choice(layer.state.layer_idx, len(lengths), top_k)
            labels = experts[row, pad:], weights[row, pad:]
            parts = [t[:-OPEN].tolist() for t in labels] + [t[-OPEN:].tolist() for t in labels]
            scores = torch.tensor(plain_term(term, *parts))
            count = BUDGET - OPEN
            limit = scores.sort(descending=True).values[count - 1]
            sure = set((scores > limit + SUMS).nonzero().flatten().tolist())
            possible = set((scores >= limit - SUMS).nonzero().flatten().tolist())
            for head in heads:
                found = {at - pad for at in head}
                assert len(found) == count and sure <= found <= possible
            assert len(possible) < length - OPEN, "all tokens alike"


@pytest.mark.parametrize("scorer", [SnapKV(window_size=6), KeyDiff()], ids=["snapkv", "keydiff"])
def test_the_scorer_alone(scorer) -> None:
    """Without terms, and in layers without a gate, the scorer decides."""
    options = {"budget": BUDGET, "page_size": 1, "window": OPEN}

    def sets(name, scheduler):
        model = tiny(name)
        inputs = prompt(model, (60,))
        cache = PiKVCache(model, scheduler=scheduler, **options)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        return [layer.state.facts.has_gate for layer in paged(cache)], kept(cache, 0)

    assert sets("mixtral", Expert(scorer, **OFF)) == sets("mixtral", scorer)
    gates, found = sets("deepseek_v3", only("spread", scorer))
    plain = sets("deepseek_v3", scorer)[1]
    assert set(gates) == {True, False}
    for gated, mine, theirs in zip(gates, found, plain, strict=True):
        assert (mine == theirs) != gated


def test_labels_of_each_head() -> None:
    """Heads that kept different tokens are judged each by its own, step by step."""
    model = build("mixtral")
    inputs = prompt(model, (70, 61))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    seen: list[Candidates] = []

    class Spy(Expert):
        def scores(self, tokens):
            seen.append(tokens)
            return super().scores(tokens)

    witness = Witness(model)
    cache = PiKVCache(model, scheduler=AdaKV(Spy(SnapKV(6), agreement=0.5)), budget=24, **SMALL)
    for start, end in ((0, 60), (60, 65), (65, 70)):
        forward(model, ids[:, start:end], mask[:, :end], cache)
    assert any(tokens.valid is not None for tokens in seen)
    assert any(tokens.experts.shape[1] == 2 for tokens in seen)
    checked = 0
    for tokens in seen:
        if len(tokens.keys) != 1:
            continue
        layer = tokens.layer_idx
        experts, _ = witness.choice(layer, 2, 2)
        labels = tokens.experts.expand(-1, tokens.keys.shape[1], -1, -1)
        mine = torch.ones_like(labels[..., 0], dtype=torch.bool)
        mine = mine if tokens.valid is None else tokens.valid
        at, last = tokens.positions[mine], experts.shape[1] - 1
        rows = [experts[row, (at + pads).clamp(max=last)] for row, pads in enumerate((0, 9))]
        assert any(torch.equal(labels[mine].long(), row) for row in rows)
        checked += len(at)
    assert checked


def test_sinks_of_the_scorer_stay() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    scheduler = Expert(StreamingLLM(sinks=3, window=17), **(OFF | {"popularity": 5.0}))
    cache = PiKVCache(model, scheduler=scheduler, page_size=1, window=OPEN)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    for layer in kept(cache, 0):
        assert all({0, 1, 2} <= head and len(head) == 20 - OPEN for head in layer)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"AdaKV\(Expert"):
        Expert(AdaKV())
    for name in ("weight", *TERMS):
        for value in ("a", True, None, float("nan"), float("inf")):
            with pytest.raises((TypeError, ValueError), match=f"`{name}` is"):
                Expert(**{name: value})
    with pytest.raises(ValueError, match="`weight` is -1"):
        Expert(weight=-1)
    with pytest.raises(TypeError, match="`scorer` is"):
        Expert("snapkv")
