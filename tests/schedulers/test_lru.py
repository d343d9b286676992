"""Least recently used: a step-by-step simulation over the attention of one layer."""

import pytest
from helpers import forward, paged, tiny
from test_h2o import BUDGET, PROMPT, TOKENS
from test_schedulers import OPEN, in_cached_space, kept, read_alone
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import LRU, LRUPlus

METHODS = {"lru": LRU(threshold=0.05), "lru_plus": LRUPlus(threshold=0.05, weight=3.0)}


def simulate(queries, keys, scale, scheduler) -> list[list[set[int]]]:
    """Kept tokens of each head of one row after the prompt and after each token behind it."""
    heads, _, total, _ = queries.shape
    weight = getattr(scheduler, "weight", 0.0)
    first = total - (TOKENS - PROMPT)
    out = []
    held = [[] for _ in range(heads)]
    last, uses = [{} for _ in range(heads)], [{} for _ in range(heads)]
    for end in range(first, total + 1):
        new = range(end) if end == first else [end - 1]
        for head in range(heads):
            held[head] += new
            for at in new:
                seen = [token for token in held[head] if token <= at]
                attention = (queries[head, :, at].float() @ keys[head, seen].T * scale).softmax(-1)
                for token, weights in zip(seen, attention.T, strict=True):
                    last[head].setdefault(token, token)
                    if (weights >= scheduler.threshold).any():
                        last[head][token] = max(at, last[head][token])
                        uses[head][token] = uses[head].get(token, 0) + 1
            sealed = [token for token in held[head] if token < end - OPEN]
            value = {t: last[head][t] + weight * uses[head].get(t, 0) for t in sealed}
            stays = sorted(sealed, key=lambda t, v=value: (v[t], t))[-(BUDGET - OPEN) :]
            held[head] = sorted(stays) + [t for t in held[head] if t >= end - OPEN]
        out.append([{t for t in head if t < end - OPEN} for head in held])
    return out


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", METHODS)
def test_kept_set(name, method) -> None:
    model, scheduler = tiny(name, num_hidden_layers=1), METHODS[method]
    lengths = (TOKENS, 47)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = []
    for row, length in enumerate(lengths):
        whole, (queries,) = read_alone(name, model, ids[row : row + 1, -length:])
        states = in_cached_space(model, paged(whole)[0], queries)
        expected.append(simulate(*states, model.model.layers[0].self_attn.scaling, scheduler))
    cache = PiKVCache(model, scheduler=scheduler, budget=BUDGET, page_size=1, window=OPEN)
    order_matters = False
    for step, end in enumerate(range(PROMPT, TOKENS + 1)):
        start = 0 if step == 0 else end - 1
        forward(model, ids[:, start:end], mask[:, :end], cache)
        for row, length in enumerate(lengths):
            found = [{at - (TOKENS - length) for at in head} for head in kept(cache, row)[0]]
            assert found == expected[row][step], (row, end)
            newest = set(range(end - OPEN - len(found[0]), end - OPEN))
            order_matters |= any({at + TOKENS - length for at in head} != newest for head in found)
    assert order_matters, "the newest stay: first in, first out"


def test_without_use_the_oldest_go() -> None:
    """A threshold that nothing reaches makes LRU first in, first out."""
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    cache = PiKVCache(model, scheduler=LRU(threshold=1.0), budget=BUDGET, page_size=1, window=OPEN)
    forward(model, inputs["input_ids"][:, 8:], inputs["attention_mask"][:, 8:], cache)
    newest = set(range(52 - BUDGET, 52 - OPEN))
    assert all(head == newest for layer in kept(cache, 0) for head in layer)


def test_bad_arguments() -> None:
    for threshold in (0, -1, 1.1, "x", True):
        with pytest.raises(ValueError, match="`threshold` is"):
            LRU(threshold=threshold)
    with pytest.raises(ValueError, match="`weight` is"):
        LRUPlus(weight=-1)
