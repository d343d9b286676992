"""A budget in bytes with schedulers that keep records of what every query attends to."""

import pytest
from helpers import chunks, forward, paged, tiny
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import H2O, LRU, AdaKV, LRUPlus

SIZES = {"page_size": 8, "window": 16}


@pytest.mark.parametrize(
    ("name", "method", "first", "share"),
    [
        ("mixtral", H2O(), 300, 0.5),
        ("mixtral", H2O(), 4, 0.9),
        ("mixtral", AdaKV(H2O()), 4, 0.9),
        ("deepseek_v3", LRU(), 300, 0.5),
        ("gpt_oss", LRUPlus(), 300, 0.5),
        ("qwen3_next", AdaKV(H2O()), 300, 0.5),
    ],
    ids=str,
)
def test_never_exceeded(name, method, first, share) -> None:
    """The queries of a prompt do not count, which are gone after it; those of generated tokens do."""
    model = tiny(name, max_position_embeddings=1024)
    inputs = prompt(model, (first + 50, first + 50))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    full = PiKVCache(model, **SIZES)
    forward(model, ids, mask, full)
    limit = int(full.nbytes * share)
    cache = PiKVCache(model, scheduler=method, budget=f"{limit}B", **SIZES)
    used = []
    for start, end in chunks(first + 50, first):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        used.append(cache.nbytes)
    assert max(used) <= limit
    assert used[-1] >= 0.6 * limit
    assert paged(cache)[0].state.held_tokens() < first + 50
