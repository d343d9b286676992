"""Accumulated attention: heavy hitters equal a step-by-step simulation of the published algorithm."""

import pytest
import torch
from helpers import forward, paged, queries_of, spans_of, tiny
from test_schedulers import OPEN, in_cached_space, kept, read_alone
from tolerances import SUMS
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.layer.departure import open_places
from pikv_hf.schedulers import H2O, AdaKV

BUDGET, PROMPT, TOKENS = 20, 40, 56
CASES = {
    "sum": H2O(recent_ratio=0.0),
    "mean": H2O(recent_ratio=0.0, mean=True),
    "recent": H2O(recent_ratio=0.6),
}


def simulate(queries, keys, scale, scheduler, first: int, chunk: int) -> list[list[set[int]]]:
    """Kept tokens of each head after the first `first` tokens, then after each `chunk`, one row.

    `queries` [H, G, T, D], `keys` [H, T, D]. Every query attends to the tokens held when its chunk
    comes, then the chunk's tokens are held and the worst ones that are not open go.
    """
    heads, _, total, _ = queries.shape
    mass = torch.zeros(heads, total, dtype=torch.float64)
    held = [set() for _ in range(heads)]
    out, start = [], 0
    for end in [first, *range(first + chunk, total + 1, chunk)]:
        for head in range(heads):
            held[head] |= set(range(start, end))
            for at in range(start, end):
                seen = sorted(token for token in held[head] if token <= at)
                scores = queries[head, :, at].double() @ keys[head, seen].double().T * scale
                mass[head, seen] += scores.softmax(-1).sum(0)
            sealed = sorted(token for token in held[head] if token < end - OPEN)
            recent = max(int(scheduler.recent_ratio * BUDGET) - OPEN, 0)
            seers = end - torch.arange(total)
            value = mass[head] / seers if scheduler.mean else mass[head]
            safe = sealed[len(sealed) - recent :]
            ranked = sorted(sealed[: len(sealed) - recent], key=lambda t, v=value: -v[t])
            stays = set(safe) | set(ranked[: BUDGET - OPEN - len(safe)])
            held[head] = stays | {token for token in held[head] if token >= end - OPEN}
        out.append([{token for token in head if token < end - OPEN} for head in held])
        start = end
    return out


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(TOKENS,), (TOKENS, 47, 39)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_kept_set(name, lengths, chunk, case) -> None:
    """One layer, whose keys and queries do not depend on what was dropped; after every forward."""
    model, scheduler = tiny(name, num_hidden_layers=1), CASES[case]
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=scheduler, budget=BUDGET, page_size=1, window=OPEN)
    expected = []
    for row, length in enumerate(lengths):
        whole, (queries,) = read_alone(name, model, ids[row : row + 1, -length:])
        states = in_cached_space(model, paged(whole)[0], queries)
        first = PROMPT - (TOKENS - length)
        scale = model.model.layers[0].self_attn.scaling
        expected.append(simulate(*states, scale, scheduler, first, chunk))
    pieces = [(0, PROMPT), *((at, at + chunk) for at in range(PROMPT, TOKENS, chunk))]
    dropped = 0
    for step, (start, end) in enumerate(pieces):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        for row, length in enumerate(lengths):
            found = [{at - (TOKENS - length) for at in head} for head in kept(cache, row)[0]]
            assert found == expected[row][step], (row, end)
            dropped += end - OPEN - (TOKENS - length) > BUDGET - OPEN
    assert dropped >= len(pieces)


@pytest.mark.parametrize("chunk", [1, 3])
def test_records_do_not_depend_on_pages(chunk) -> None:
    """In pages of any size, under the budget, held back or not: the same attention is counted."""
    model = tiny("mixtral", num_hidden_layers=1)
    inputs = prompt(model, (60, 52))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = []
    for page_size, hold in ((1, False), (4, False), (16, False), (4, True)):
        scheduler = AdaKV(H2O(recent_ratio=0.0))
        options = {"page_size": page_size, "window": 4, "hold_prompt": hold}
        cache = PiKVCache(model, scheduler=scheduler, budget=1000, **options)
        for start, end in [(0, 30), (30, 45), *((at, at + chunk) for at in range(45, 60, chunk))]:
            forward(model, ids[:, start:end], mask[:, :end], cache)
        layer = paged(cache)[0]
        assert (
            layer.state.observed.pending is None
            or layer.state.observed.pending.shape[3] <= page_size + 4
        )
        total = torch.zeros(2, layer.state.tail.keys.shape[1])
        for row in range(2):
            for span in spans_of(layer, [row]):
                total[row] += span["record"][0, ..., 0].sum(-1)
        held, is_open = layer.state.observed.record.shape[2], open_places(layer.state)
        is_open = 1 if is_open is None else is_open[:, None, :held]
        total += (layer.state.observed.record[..., 0] * is_open).sum(-1)
        pending = (
            0 if layer.state.observed.pending is None else layer.state.observed.pending.shape[3]
        )
        groups = queries_of(layer) is None and model.config.num_attention_heads // 2
        # Each query spreads an attention of 1.
        expected = torch.tensor([60.0 - pending, 52.0 - pending])[:, None] * groups
        assert torch.allclose(total, expected.expand_as(total), rtol=SUMS)
        found.append(total)


def test_bad_arguments() -> None:
    for ratio in (-0.1, 1.5, "half", True):
        with pytest.raises(ValueError, match="`recent_ratio` is"):
            H2O(recent_ratio=ratio)
    with pytest.raises(TypeError, match="`mean` is"):
        H2O(mean=1)
