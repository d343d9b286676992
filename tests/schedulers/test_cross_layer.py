"""Schedulers whose layers know what earlier ones saw: fastv and pikv_layer_sum."""

import pytest
import torch
from helpers import forward, generate, held_by, paged, queries_of, spans_of, tail_states, tiny
from test_schedulers import OPEN, in_cached_space, kept, read_alone, softmax_of_newest
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import AdaKV, ChunkKV, FastV, PiKVLayerSum, PyramidKV

LAYERS, BUDGET, WINDOW = 4, 20, 6
FAMILIES = ["mixtral", "olmoe", "deepseek_v3"]
OPTIONS = {"page_size": 1, "window": OPEN, "budget": BUDGET}
PROMPTS = {"one_row": (50,), "left_padded": (50, 41, 33)}


def best(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda at: -scores[at])[:count])


def fastv(masses: list[dict[int, float]], layer: int = 2) -> list[set[int]]:
    """What each layer keeps, by the attention that its candidates get in each layer."""
    chosen = best(masses[layer], BUDGET - OPEN)
    return [set(mass) if number < layer else chosen for number, mass in enumerate(masses)]


def layer_sum(masses: list[dict[int, float]]) -> list[set[int]]:
    totals: dict[int, float] = {}
    found = []
    for mass in masses:
        for at, share in mass.items():
            totals[at] = totals.get(at, 0.0) + share
        found.append(best({at: totals[at] for at in mass}, BUDGET - OPEN))
    return found


METHODS = {
    "fastv": (FastV(), fastv, 1),
    "fastv-1": (FastV(layer=1, window_size=3), lambda masses: fastv(masses, 1), 3),
    "pikv_layer_sum": (PiKVLayerSum(window_size=WINDOW), layer_sum, WINDOW),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("method", METHODS)
def test_kept_of_a_prompt(name, lengths, method) -> None:
    """As defined, from queries and keys of the plain model; in every row what it would be alone."""
    scheduler, oracle, newest = METHODS[method]
    model = tiny(name, num_hidden_layers=LAYERS)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=scheduler, **OPTIONS)
    forward(model, ids, mask, cache)
    scale = paged(cache)[0].state.scale
    for row, length in enumerate(lengths):
        whole, everything = read_alone(name, model, ids[row : row + 1, -length:])
        masses = []
        for layer, queries in zip(paged(whole), everything, strict=True):
            attention = softmax_of_newest(*in_cached_space(model, layer, queries), scale, newest)
            masses.append(dict(enumerate(attention.mean((0, 1, 2))[:-OPEN].tolist())))
        pad = ids.shape[1] - length
        found = [[{at - pad for at in head} for head in layer] for layer in kept(cache, row)]
        expected = oracle(masses)
        assert found == [
            [tokens] * len(heads) for tokens, heads in zip(expected, found, strict=True)
        ]
        assert len(set(map(frozenset, expected))) > 1


def keys_of(layer, row: int) -> dict[int, torch.Tensor]:
    """Position -> key [H, D] of every token that a row holds, when all heads hold the same."""
    spans = [(span["positions"][0, 0], span["keys"][0]) for span in spans_of(layer, [row])]
    opened = tail_states(layer)[0][row].clone()  # the next step moves them
    spans.append(
        (torch.arange(layer.state.num_seen - opened.shape[1], layer.state.num_seen), opened)
    )
    return {int(at): keys[:, place] for ats, keys in spans for place, at in enumerate(ats.tolist())}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_kept_while_generating(name, method) -> None:
    """Step by step, from the queries and keys of the cache itself; rows of other lengths beside."""
    scheduler, oracle, newest = METHODS[method]
    model = tiny(name, num_hidden_layers=LAYERS)
    inputs = prompt(model, (50, 41))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=scheduler, **OPTIONS)
    forward(model, ids[:, :40], mask[:, :40], cache)
    changed = 0
    for end in range(41, 51):
        before = [[keys_of(layer, row) for layer in paged(cache)] for row in (0, 1)]
        forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
        for row in (0, 1):
            masses = []
            for layer, held in zip(paged(cache), before[row], strict=True):
                held[end - 1] = tail_states(layer)[0][row][:, -1]
                queries = queries_of(layer)[row][:, :, -newest:].double()
                keys = torch.stack(list(held.values()), dim=1).double()
                scores = queries @ keys[:, None].transpose(-1, -2) * layer.state.scale
                at = torch.tensor(list(held))
                hidden = at > torch.arange(end - newest, end)[:, None]
                attention = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1, 2))
                shares = dict(zip(held, attention.tolist(), strict=True))
                masses.append({at: shares[at] for at in held if at < end - OPEN})
            expected, found = oracle(masses), kept(cache, row)
            assert found == [
                [tokens] * len(heads) for tokens, heads in zip(expected, found, strict=True)
            ]
            changed += set(masses[-1]) - expected[-1] != {end - OPEN - 1}
    assert changed > 5, "only the newest candidate went"


@pytest.mark.parametrize("method", ["fastv", "pikv_layer_sum"])
def test_notes_are_of_one_forward_pass(method) -> None:
    """A pass that failed half-way, and tokens that were taken back, leave nothing behind."""
    model = tiny("mixtral", num_hidden_layers=LAYERS)
    inputs = prompt(model, (50,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = PiKVCache(model, scheduler=method, **OPTIONS)
    forward(model, ids, mask, expected)
    cache = PiKVCache(model, scheduler=method, **OPTIONS)
    last = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        forward(model, ids.flip(1), mask, cache)
    last.remove()
    assert cache.step.notes([0])
    cache.reset()
    forward(model, ids, mask, cache)
    assert kept(cache, 0) == kept(expected, 0)
    cache.activate_past_recording()
    forward(model, ids[:, :5], torch.ones(1, 55), cache)
    cache.crop(-1)
    assert not cache.step.notes([0])


def fail(*args) -> None:
    raise KeyError


def test_budgets_and_refusals() -> None:
    model = tiny("mixtral", num_hidden_layers=LAYERS)
    inputs = prompt(model, (60, 51))
    cache = PiKVCache(model, scheduler=FastV(layer=3), **OPTIONS)
    generate(model, inputs, cache, max_new_tokens=20)
    held = [[int(held_by(layer, row)[0]) for layer in paged(cache)] for row in (0, 1)]
    assert held == [[79 - OPEN] * 3 + [BUDGET - OPEN], [70 - OPEN] * 3 + [BUDGET - OPEN]]
    for scheduler in (FastV(layer=4), ChunkKV(FastV(layer=9))):
        with pytest.raises(ValueError, match="only 4 layers of the model are paged"):
            PiKVCache(model, scheduler=scheduler, budget=30)
    for budget in ("1GiB", {"prefill": "1GiB", "decode": 30}):
        with pytest.raises(ValueError, match="keeps some layers whole"):
            PiKVCache(model, scheduler="fastv", budget=budget)
    with pytest.raises(ValueError, match="has budgets of its own"):
        PyramidKV(FastV())
    for scorer in (FastV(), PiKVLayerSum()):
        with pytest.raises(ValueError, match="scores every KV head apart"):
            AdaKV(scorer)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="`layer` is"):
            FastV(layer=wrong)
        with pytest.raises(ValueError, match="`window_size` is"):
            FastV(window_size=wrong)
        with pytest.raises(ValueError, match="`window_size` is"):
            PiKVLayerSum(window_size=wrong)
