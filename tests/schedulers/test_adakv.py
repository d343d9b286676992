"""KV heads of different lengths: who stays, what is freed, and what attention reads."""

import pytest
import torch
from helpers import forward, paged, tiny
from test_combinations import assert_reads_what_was_kept
from test_schedulers import OPEN, kept, read_alone, snapkv
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import AdaKV, KeyDiff, PyramidKV, SnapKV, StreamingLLM, Tova

BUDGET, ALPHA = 20, 0.2
SNAP = SnapKV(window_size=6, kernel_size=3)


def adakv(scores: torch.Tensor, budget: int) -> list[set[int]]:
    """Algorithm 1 of the paper with its safeguard, token by token; scores [H, T]."""
    heads, tokens = scores.shape
    safe = int(ALPHA * budget)
    order = [sorted(range(tokens), key=lambda t, s=s: -s[t]) for s in scores.tolist()]
    chosen = [set(best[:safe]) for best in order]
    rest = sorted(
        ((float(scores[h, t]), h, t) for h in range(heads) for t in order[h][safe:]), reverse=True
    )
    for _, head, token in rest[: heads * (budget - safe)]:
        chosen[head].add(token)
    return chosen


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("lengths", [(50,), (50, 41, 33)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_kept_set(name, lengths, page_size) -> None:
    """Whole heads of a layer share the budget as published; every row as if it were alone."""
    model = tiny(name, num_hidden_layers=2)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": page_size, "window": OPEN, "budget": BUDGET}
    cache = PiKVCache(model, scheduler=AdaKV(SNAP, alpha=ALPHA), **options)
    forward(model, ids, mask, cache)
    counts = []
    for row, length in enumerate(lengths):
        whole, everything = read_alone(name, model, ids[row : row + 1, -length:])
        found_in_layers = kept(cache, row)
        for layer, queries, found in zip(paged(whole), everything, found_in_layers, strict=True):
            scores = snapkv(queries[0], layer.states()[0][0], paged(cache)[0].state.scale)
            # In pages of 4 the newest tokens that fill no page stay open.
            scores = scores[:, : (length - OPEN) // page_size * page_size]
            if page_size > 1:
                counts.append([len(head) for head in found])
                assert sum(counts[-1]) == (BUDGET - OPEN) * len(found)
                continue
            for head, expected in zip(found, adakv(scores, BUDGET - OPEN), strict=True):
                assert {at - (ids.shape[1] - length) for at in head} == expected
            counts.append([len(head) for head in found])
    assert any(len(set(heads)) > 1 for heads in counts), "all heads keep equally many"
    assert min(map(min, counts)) >= int(ALPHA * (BUDGET - OPEN))


@pytest.mark.parametrize("scorer", [SNAP, KeyDiff()], ids=["snapkv", "keydiff"])
@pytest.mark.parametrize("compressor", [None, "int8", "pyramid"])
def test_attention_reads_what_each_head_kept(scorer, compressor) -> None:
    assert assert_reads_what_was_kept(AdaKV(scorer), compressor), "all heads keep equally many"


def test_ragged_heads_free_their_bytes() -> None:
    """A layer whose heads differ takes what one of the same mean takes, and a page a head at most."""
    model = tiny("mixtral")
    inputs = prompt(model, (900,))
    held = []
    for scheduler in (SNAP, AdaKV(SNAP)):
        cache = PiKVCache(model, scheduler=scheduler, budget=300, page_size=8, window=8)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        held.append(sum(t.nbytes for layer in paged(cache) for t in layer.state.pages.tensors()))
        heads, dim = paged(cache)[0].state.tail.keys.shape[1::2]
    page = 8 * heads * (2 * dim * 4 + 4) + 12 * heads
    assert held[0] <= held[1] <= held[0] * 1.02 + 2 * page * len(paged(cache))


def test_composition_and_refusals() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (80,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"budget": 30, "page_size": 1, "window": 5}
    pyramid = PiKVCache(model, scheduler=PyramidKV(AdaKV(SNAP), beta=4.0), **options)
    forward(model, ids, mask, pyramid)
    totals = [sum(map(len, layer)) for layer in kept(pyramid, 0)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
    alike = PiKVCache(model, scheduler=AdaKV(SNAP, alpha=1.0), **options)
    plain = PiKVCache(model, scheduler=SNAP, **options)
    for cache in (alike, plain):
        forward(model, ids, mask, cache)
    assert kept(alike, 0) == kept(plain, 0), "alpha=1 gives every head the same budget"
    for scorer in (Tova(), AdaKV()):
        with pytest.raises(ValueError, match="scores every KV head apart"):
            AdaKV(scorer)
    for alpha in (-0.1, 1.1, "a"):
        with pytest.raises(ValueError, match="`alpha` is"):
            AdaKV(alpha=alpha)
    with pytest.raises(TypeError, match="`scorer` is"):
        AdaKV(StreamingLLM)
