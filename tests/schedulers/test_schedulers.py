"""Who stays: every scheduler against its published algorithm in plain torch, row by row."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BUDGETED,
    SMALL,
    dynamic,
    forward,
    generate,
    held_by,
    paged,
    rows_of,
    spans_of,
    tail_length,
    tiny,
    two_layers,
)
from test_observed import asked
from tolerances import FLOAT32, LOGITS
from torch import Tensor
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import Candidates, ChunkKV, FastV, KeyDiff, Knorm, PyramidKV, SnapKV, Tova
from pikv_hf.schedulers.attention_mass import attention_mass

OPEN, BUDGET = 9, 20
FAMILIES = ("mixtral", "olmoe", "deepseek_v3")
LAYERS = 2


def best(scores: Tensor, count: int) -> list[set[int]]:
    return [set(row.tolist()) for row in scores.topk(count, dim=-1).indices]


def assert_same_best(found: set[int], expected: set[int], scores: Tensor) -> None:
    """The same tokens, or others of the same score: padding changes keys by rounding."""
    assert len(found) == len(expected)
    instead, missing = sorted(found - expected), sorted(expected - found)
    worse = scores[missing].sort().values - scores[instead].sort().values
    assert (worse.abs() <= FLOAT32 * scores.abs().max()).all(), (found, expected)


def softmax_of_newest(queries: Tensor, keys: Tensor, scale: float, newest: int) -> Tensor:
    """[H, G, newest, T]: the causal attention of the newest tokens, in float64."""
    scores = queries[:, :, -newest:].double() @ keys[:, None].double().transpose(-1, -2) * scale
    length = keys.shape[1]
    causal = torch.ones(length, length).tril().bool()[-newest:]
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


# Each: scores [H, T - OPEN] of one row from its queries [H, G, T, D] and keys [H, T, D].


def knorm(queries, keys, scale):
    return -keys[:, :-OPEN].double().square().sum(-1).sqrt()


def keydiff(queries, keys, scale):
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    anchor = unit.mean(1, keepdim=True)
    return -((unit * anchor).sum(-1) / anchor.norm(dim=-1))[:, :-OPEN]


def tova(queries, keys, scale):
    attention = softmax_of_newest(queries, keys, scale, 1)[:, :, 0]
    return attention.mean((0, 1)).expand(len(keys), -1)[:, :-OPEN]


def snapkv(queries, keys, scale, window=6, kernel=3):
    attention = softmax_of_newest(queries, keys, scale, window).mean(2)[..., :-OPEN]
    padded = F.pad(attention, (kernel // 2, kernel // 2))
    return padded.unfold(-1, kernel, 1).mean(-1).mean(1)


def chunkkv(queries, keys, scale, length=4):
    scores = snapkv(queries, keys, scale).mean(0)
    chunks = [part.mean().expand(len(part)) for part in scores.split(length)]
    newer_first = torch.arange(len(scores)) * 1e-12  # of equal scores the later
    return (torch.cat(chunks) + newer_first).expand(len(keys), -1)


METHODS = {
    "knorm": (Knorm(), knorm),
    "keydiff": (KeyDiff(), keydiff),
    "tova": (Tova(), tova),
    "snapkv": (SnapKV(window_size=6, kernel_size=3), snapkv),
    "chunkkv": (ChunkKV(SnapKV(window_size=6, kernel_size=3), chunk_length=4), chunkkv),
}


def kept(cache: PiKVCache, row: int) -> list[list[set[int]]]:
    """Positions of the sealed tokens of a batch row: [layer][head]."""
    out = []
    for layer in paged(cache):
        spans = spans_of(layer, [row])
        heads = layer.state.tail.keys.shape[1]
        out.append([set() for _ in range(heads)])
        for span in spans:
            positions = span["positions"].expand(1, heads, -1)[0]
            valid = span.all_valid()["valid"].expand(1, heads, -1)[0]
            for head in range(heads):
                held = positions[head][valid[head]].tolist()
                new = set(held)
                assert len(new) == len(held) and not new & out[-1][head]
                out[-1][head] |= new
    return out


def read_alone(name, model, ids) -> tuple[PiKVCache, list[Tensor]]:
    """A cache that keeps all of the one row `ids`, and the queries of each layer of the plain model."""
    cache, mask = PiKVCache(model), torch.ones_like(ids)
    forward(model, ids, mask, cache)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return cache, asked(name, inputs, num_hidden_layers=model.config.num_hidden_layers)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(50,), (50, 41, 33)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("budget", [BUDGET, 0.45])
@pytest.mark.parametrize("method", METHODS)
def test_kept_set(name, lengths, budget, method) -> None:
    """Of a prompt, those of the published scores; in every row what it would be alone."""
    scheduler, oracle = METHODS[method]
    model = tiny(name, num_hidden_layers=LAYERS)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 1, "window": OPEN, "budget": budget}
    cache = PiKVCache(model, scheduler=scheduler, **options)
    forward(model, ids, mask, cache)
    sets = []
    for row, length in enumerate(lengths):
        whole, everything = read_alone(name, model, ids[row : row + 1, -length:])
        for layer, queries, found in zip(paged(whole), everything, kept(cache, row), strict=True):
            queries, keys = in_cached_space(model, layer, queries)
            scale = paged(cache)[0].state.scale if scheduler.needs.queries else 1.0
            count = budget if isinstance(budget, int) else int(budget * length)
            scores = oracle(queries, keys, scale)
            expected = best(scores, count - OPEN)
            pad = ids.shape[1] - length
            for head, best_head, score in zip(found, expected, scores, strict=True):
                assert_same_best({at - pad for at in head}, best_head, score)
            sets += expected
    assert sets[0] != set(range(len(sets[0]))), "the first tokens stay: any order would do"


def in_cached_space(model, layer, queries):
    """Queries [H, G, T, D] and keys [H, T, D] of the one row, of latents where these are cached."""
    keys, values = layer.states()
    if layer.state.latent_rank is None:
        return queries[0], keys[0]
    from pikv_hf.model.latent import LatentQuery

    module = model.model.layers[layer.state.layer_idx].self_attn
    flat = queries.flatten(1, 2)
    absorbed = LatentQuery(module, flat, layer.state.latent_rank).absorb(flat)
    return absorbed, torch.cat([keys, values], dim=-1)[0]


def test_pyramid_budgets() -> None:
    """Layer budgets fall linearly from 2 - 1/beta to 1/beta times the mean, as far as there is."""
    model = tiny("mixtral", num_hidden_layers=4)
    inputs = prompt(model, (200,))
    scheduler = PyramidKV(Knorm(), beta=4.0)
    cache = PiKVCache(model, scheduler=scheduler, budget=40 + OPEN, page_size=1, window=OPEN)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    lengths = [len(layer[0]) for layer in kept(cache, 0)]
    assert lengths == [70, 50, 30, 10]
    short = [scheduler.layer_budget(40, 60, layer, 4) for layer in range(4)]
    assert short == [60, 47, 33, 20]
    assert PyramidKV().layer_budget(40, 900, 0, 1) == 40, "the mean over one layer"


@pytest.mark.parametrize("seed", range(3))
def test_attention_mass_in_blocks(seed, monkeypatch) -> None:
    """The same in blocks of any size, with queries among the candidates, zeros and open tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    queries, keys = draw(2, 3, 2, 7, 8), draw(2, 3, 40, 8)
    positions = torch.arange(40 - 4).expand(2, 3, -1)
    tokens = Candidates(
        positions, keys[:, :, :-4], keys[:, :, :-4], keys[:, :, -4:], 40, 0, queries, 0.4
    )
    expected = torch.stack(
        [softmax_of_newest(q, k, 0.4, 7).mean(2) for q, k in zip(queries, keys, strict=True)]
    )[..., :-4]
    for block in (1, 5 * 2 * 3 * 2 * 7, 2**24):
        monkeypatch.setattr("pikv_hf.schedulers.attention_mass.BLOCK", block)
        assert torch.allclose(attention_mass(tokens).double(), expected, atol=FLOAT32)


def test_queries_older_than_every_key() -> None:
    """A query whose keys are all gone has no part in what is attended to."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 1, 2, 6, 8), torch.randn(1, 1, 5, 8)
    positions = torch.arange(7, 10).view(1, 1, 3)
    asked = Candidates(positions, keys[:, :, :3], keys, keys[:, :, 3:], 12, 0, queries, 0.4)
    mass = attention_mass(asked)
    late = queries[:, :, :, 1:]  # of the queries at 6 to 11 the first sees nothing
    seeing = Candidates(positions, keys[:, :, :3], keys, keys[:, :, 3:], 12, 0, late, 0.4)
    assert mass.isfinite().all()
    assert torch.allclose(mass, attention_mass(seeing) * 5 / 6)


def test_random_does_not_depend_on_when_it_is_asked() -> None:
    """Chunked, step by step and padded: the same tokens stay; about the same number everywhere."""
    model = tiny("mixtral")
    options = {"scheduler": "random", "budget": 30, "page_size": 1, "window": 5}
    inputs = prompt(model, (120,))
    found = []
    for step in (120, 40, 1):
        cache = PiKVCache(model, **options)
        for start in range(0, 120, step):
            end = start + step
            forward(
                model, inputs["input_ids"][:, start:end], inputs["attention_mask"][:, :end], cache
            )
        found.append(kept(cache, 0))
    assert found[0] == found[1] == found[2]
    layer = found[0][0]
    assert layer[0] != layer[1] and found[0][0] != found[0][1]
    spread = [sum(at < 57 for at in head) for heads in found[0] for head in heads]
    assert 5 < sum(spread) / len(spread) < 20


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("method", BUDGETED)
def test_generate(name, method) -> None:
    """A budget that holds everything changes nothing; a small one bounds what is held."""
    model = tiny(name) if method == "fastv" else two_layers(name)
    inputs = prompt(model, (60, 51))
    whole = 0
    if method == "fastv":  # keeps its first layers whole: test_cross_layer.py
        method, whole = FastV(layer=1), 1
    small = SMALL | {"hold_prompt": method == "kvzip"}
    expected = generate(model, inputs, dynamic(model))
    everything = PiKVCache(model, scheduler=method, budget=1000, **small)
    actual = generate(model, inputs, everything)
    assert torch.equal(actual.tokens, expected.tokens)
    assert (actual.logits - expected.logits).abs().max() <= LOGITS
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 16}):
        cache = PiKVCache(model, scheduler=method, budget=24, compressor="int8", **small)
        generate(model, inputs, cache, **options)
        layers = paged(cache)
        for row in range(rows_of(layers[0])):
            held = [float(held_by(layer, row).double().mean()) for layer in layers[whole:]]
            assert 0 < sum(held) <= (24 - SMALL["window"]) * len(held)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", sorted({*BUDGETED} - {"kvzip"}))  # which refuses them
def test_drafted_tokens(name, method) -> None:
    """Drafts that are verified and taken back leave what plain decoding leaves, if none is sealed."""
    model = tiny(name) if method == "fastv" else two_layers(name)
    inputs = prompt(model, (64,))
    results = []
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = PiKVCache(model, scheduler=method, budget=24, page_size=20, window=4)
        results.append(generate(model, inputs, cache, **options).tokens)
        held = [float(held_by(layer, 0).double().mean()) for layer in paged(cache)]
        assert 0 < sum(held) < 60 * len(held)
        assert all(tail_length(layer) < 20 for layer in paged(cache))
    assert torch.equal(*results)
