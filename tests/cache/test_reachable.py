"""`nbytes` is what a cache keeps alive, for every method, in every state."""

from typing import Any

import pytest
import torch
from helpers import BUDGETED, forward, tiny
from test_duo import profile_of
from zoo import prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.schedulers import Duo, FastV
from pikv_hf.storage.memory import storage_bytes

PLAIN = [name for name, method in COMPRESSORS.items() if not method.needs_calibration]
# What belongs to the model, or to Python.
FOREIGN = ("Binding", "module", "function", "ReferenceType", "finalize")


def reachable(cache: PiKVCache) -> int:
    """Bytes of all storages that lead from the cache to a tensor, but not through the model."""
    seen: set[int] = set()
    todo: list[Any] = [cache]
    found = []
    while todo:
        value = todo.pop()
        is_foreign = isinstance(value, torch.nn.Module | type) or type(value).__name__ in FOREIGN
        if id(value) in seen or is_foreign:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif hasattr(value, "__dict__"):
            todo += vars(value).values()
    return storage_bytes(found)


def check_all_states(model, options) -> None:
    """After a prompt, generated tokens, a piece, a fork, other rows, taken back and held tokens."""
    inputs = prompt(model, (60, 47))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hold = options.get("scheduler") == "kvzip"
    cache = PiKVCache(model, page_size=4, window=8, hold_prompt=hold, **options)

    def check(state: str, other: PiKVCache = cache) -> None:
        assert reachable(other) == other.nbytes, state

    for start, end in ((0, 40), (40, 41), (41, 52), (52, 53)):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        check(f"{end} tokens")
    fork = cache.fork(2)
    check("a fork", fork)
    fork.reorder_cache(torch.tensor([3, 2, 1, 0]))
    check("other rows", fork)
    fork.batch_select_indices(torch.tensor([0]))
    check("a row", fork)
    cache.crop(-1)
    check("cropped")
    with cache.holding():
        for start, end in ((52, 56), (56, 57)):
            forward(model, ids[:, start:end], mask[:, :end], cache)
            check("held")
    check("no longer held")
    cache.detach()
    fork.detach()


def options_of(name: str) -> dict[str, Any]:
    return {"scheduler": FastV(layer=1) if name == "fastv" else name, "budget": 20}


@pytest.mark.parametrize("method", BUDGETED)
def test_schedulers(method) -> None:
    check_all_states(tiny("mixtral", num_hidden_layers=2), options_of(method))


@pytest.mark.parametrize("method", PLAIN)
def test_compressors(method) -> None:
    model = tiny("mixtral", head_dim=64, num_hidden_layers=2)
    check_all_states(model, {"compressor": method})


@pytest.mark.parametrize(
    ("name", "attn"),
    [("mixtral", "eager"), ("mixtral", "sdpa"), ("deepseek_v3", "sdpa"), ("gpt_oss", "eager")],
)
def test_architectures(name, attn) -> None:
    """With labels, an error that is measured, and masks of either kind."""
    model = tiny(name, attn)
    options = {"scheduler": "h2o", "budget": 20, "router": "all", "probe": True}
    inputs = prompt(model, (60, 47))
    cache = PiKVCache(model, page_size=4, window=8, **options)
    with cache.holding():
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        assert reachable(cache) == cache.nbytes
    assert reachable(cache) == cache.nbytes


def test_duo(tmp_path) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    heads = profile_of(model, tmp_path / "heads.safetensors")
    check_all_states(model, {"scheduler": Duo(profile=heads, sinks=3, recent=12)})
