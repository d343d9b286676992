"""KV heads of different lengths: who stays, what is freed, and what attention reads."""

import pytest
import torch
from helpers import dynamic, forward, paged, tiny
from test_observed import asked
from test_schedulers import OPEN, kept, snapkv
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
        alone = {"input_ids": ids[row : row + 1, -length:]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        whole = PiKVCache(model)
        forward(model, ids=alone["input_ids"], mask=alone["attention_mask"], cache=whole)
        everything = asked(name, alone, num_hidden_layers=2)
        found_in_layers = kept(cache, row)
        for layer, queries, found in zip(paged(whole), everything, found_in_layers, strict=True):
            scores = snapkv(queries[0], layer.states()[0][0], paged(cache)[0].scale)
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
    """Steps of a model of one layer, beside a full cache that hides from each head what it dropped,
    and holds what is left as the pages give it back."""
    model = tiny("mixtral", num_hidden_layers=1)
    inputs = prompt(model, (60, 60))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 4, "window": 5, "budget": 20, "compressor": compressor}
    cache, full = PiKVCache(model, scheduler=AdaKV(scorer), **options), dynamic(model)
    forward(model, ids[:, :40], mask[:, :40], cache)
    forward(model, ids[:, :40], mask[:, :40], full)
    differ = False
    for end in range(41, 61):
        sets = [kept(cache, row)[0] for row in range(2)]
        differ |= len({len(head) for row in sets for head in row}) > 1
        copy_pages(paged(cache)[0], full.layers[0])
        opened = range(end - 1 - paged(cache)[0].tail.length, end)
        visible = torch.tensor(
            [[[at in head or at in opened for at in range(end)] for head in row] for row in sets]
        )
        groups = model.config.num_attention_heads // visible.shape[1]
        hidden = ~visible.repeat_interleave(groups, dim=1)[:, :, None]
        heads_mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        expected = model(
            ids[:, end - 1 : end],
            attention_mask=heads_mask,
            position_ids=torch.full((2, 1), end - 1),
            past_key_values=full,
        ).logits
        actual = forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= 5e-6
    assert differ


def copy_pages(layer, full) -> None:
    """Write the decoded tokens of the pages over those of a full cache."""
    for row in range(2):
        for span in layer.pages.spans([row]):
            valid = span.all_valid()["valid"].expand(span["keys"].shape[:3])
            at = span["positions"].expand(valid.shape)[valid].long()
            head = torch.arange(valid.shape[1])[:, None].expand(valid.shape[1:])[valid[0]]
            full.keys[row, head, at] = span["keys"][valid]
            full.values[row, head, at] = span["values"][valid]


def test_ragged_heads_free_their_bytes() -> None:
    """A layer whose heads differ takes what one of the same mean takes, and a page a head at most."""
    model = tiny("mixtral")
    inputs = prompt(model, (900,))
    held = []
    for scheduler in (SNAP, AdaKV(SNAP)):
        cache = PiKVCache(model, scheduler=scheduler, budget=300, page_size=8, window=8)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        held.append(sum(t.nbytes for layer in paged(cache) for t in layer.pages.tensors()))
        heads, dim = paged(cache)[0].tail.keys.shape[1::2]
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
