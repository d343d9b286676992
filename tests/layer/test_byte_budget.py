"""A budget in bytes is one for the whole cache: layers that are not paged and token ids included."""

import copy

import pytest
import torch
from helpers import chunks, forward, generate, paged, tiny
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.attention import function as attention
from pikv_hf.cache.held_elsewhere import HeldElsewhere
from pikv_hf.schedulers import AdaKV, SnapKV

# What stands beside the paged layers: sliding windows, chunks, states of linear attention and of
# convolutions. In granitemoe_swa and minimax a paged layer comes first.
MIXED = {
    "gpt_oss": {"sliding_window": 64},
    "gemma4": {"sliding_window": 64},
    "granitemoe_swa": {"sliding_window": 64},
    "llama4": {"attention_chunk_size": 64},
    "qwen3_next": {},
    "lfm2_moe": {},
    "nemotron_h": {},
    "minimax": {},
}
SMALL = {"page_size": 8, "window": 8}


def model_of(name: str):
    return tiny(name, max_position_embeddings=2048, **MIXED.get(name, {}))


def inputs_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = prompt(model, (460, 420))
    return inputs["input_ids"], inputs["attention_mask"]


def full_bytes(model, tokens: int) -> int:
    ids, mask = inputs_of(model)
    cache = PiKVCache(model, **SMALL)
    forward(model, ids[:, :tokens], mask[:, :tokens], cache)
    return cache.nbytes


def used(cache, steps) -> list[int]:
    """Bytes held after each forward pass over (start, end)."""
    model = cache.model
    ids, mask = inputs_of(model)
    sizes = []
    for start, end in steps:
        forward(model, ids[:, start:end], mask[:, :end], cache)
        sizes.append(cache.nbytes)
    return sizes


@pytest.mark.parametrize("pieces", ["at once", "in chunks"])
@pytest.mark.parametrize("name", [*MIXED, "mixtral"])
def test_whole_cache(name, pieces) -> None:
    """After the prompt, each piece of it, and each of many generated tokens."""
    model = model_of(name)
    limit = full_bytes(model, 400) * 6 // 10
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", **SMALL)
    first = [(0, 400)] if pieces == "at once" else chunks(400, 200, 50)
    sizes = used(cache, [*first, *chunks(460, 400)[1:]])
    assert max(sizes) <= limit
    assert min(sizes[len(first) - 1 :]) >= 0.75 * limit


@pytest.mark.parametrize("compressor", [None, "int4"])
@pytest.mark.parametrize("method", ["random", AdaKV(SnapKV(window_size=4))], ids=str)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next"])
def test_methods(name, method, compressor) -> None:
    model = model_of(name)
    limit = full_bytes(model, 400) // 2
    options = {**SMALL, "compressor": compressor, "interval": 4}
    cache = PiKVCache(model, scheduler=method, budget=f"{limit}B", **options)
    assert max(used(cache, chunks(460, 400))) <= limit


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", ["gpt_oss", "gemma4", "lfm2_moe"])
def test_generate(name, options) -> None:
    model = model_of(name)
    limit = full_bytes(model, 460) // 2 * options.get("num_beams", 1)
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", **SMALL)
    inputs = prompt(model, (460, 420))
    generate(model, inputs, cache, max_new_tokens=90, **options)
    assert cache.nbytes <= limit


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "lfm2_moe"])
def test_drafted_tokens(name) -> None:
    """Layers that keep the prompt for a verification keep no more than before once it is over."""
    model = model_of(name)
    inputs = prompt(model, (420,))
    full = PiKVCache(model, **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], full)
    cache = PiKVCache(model, scheduler="knorm", budget=f"{full.nbytes // 2}B", **SMALL)
    generate(model, inputs, cache, max_new_tokens=40, prompt_lookup_num_tokens=5)
    assert 0.75 * (full.nbytes // 2) <= cache.nbytes <= full.nbytes // 2


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe_swa"])
def test_held_prompts(name) -> None:
    """A prompt that is read in pieces, and dropped from at its end."""
    model = model_of(name)
    limit = full_bytes(model, 400) // 2
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", hold_prompt=True, **SMALL)
    assert max(used(cache, [(0, 200), (200, 400), (400, 401)])[2:]) <= limit


def test_layers_that_grow() -> None:
    """A sparse layer keeps every token: the more it holds, the fewer are left to paged layers."""
    model = model_of("minimax_m3_vl")
    limit = full_bytes(model, 460) * 8 // 10
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", **SMALL)
    sizes, held = [], []
    for step in chunks(460, 300):
        sizes += used(cache, [step])
        held.append(paged(cache)[0].state.held_tokens())
    assert max(sizes[SMALL["page_size"] :]) <= limit
    assert held[-1] < held[100] - 20


def test_layers_that_are_not_ours_to_read(monkeypatch) -> None:
    """A layer that turns out unpaged keeps every token; the others share what it leaves."""
    why = attention.unpaged_reason

    def unpaged(state, *args):
        return "a test says so" if state.layer_idx == 1 else why(state, *args)

    monkeypatch.setattr(attention, "unpaged_reason", unpaged)
    model = model_of("mixtral")
    limit = full_bytes(model, 460) * 6 // 10
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", **SMALL)
    sizes = used(cache, chunks(460, 300))
    assert cache.layers[1].state.unpaged_reason is not None
    assert max(sizes[SMALL["page_size"] :]) <= limit
    cache.reset()
    assert not cache.elsewhere.unpaged


def test_copies_and_new_texts() -> None:
    """A fork, a copy, a loaded cache, and one that is used again count their own layers."""
    model = model_of("gpt_oss")
    limit = full_bytes(model, 400) // 2
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", **SMALL)
    used(cache, [(0, 400)])
    for other in (cache.fork(), copy.deepcopy(cache)):
        assert max(used(other, chunks(460, 400)[1:])) <= limit
        assert all(any(o is layer for layer in other.layers) for o in other.elsewhere.others)
    cache.reset()
    assert max(used(cache, chunks(460, 400))) <= limit
    assert all(any(o is layer for layer in cache.layers) for o in cache.elsewhere.others)


def test_too_little_is_refused() -> None:
    """The message says what the budget is, what others take, and what to do."""
    model = model_of("gpt_oss")
    cache = PiKVCache(model, scheduler="knorm", budget="70kB", **SMALL)
    layers, rows, window, heads, head_bytes = 2, 2, 64, 2, 2 * 16 * 4
    sliding = layers * rows * window * heads * head_bytes
    ids = rows * 4 * (408 + 408 // 8 + 64)
    padding = rows * 40  # which of the first tokens are
    beside = sliding + ids + padding + layers * 8  # each keeps its window as a number
    told = f"`budget` is 70000 bytes, of which .* take {beside}.*leaves {(70000 - beside) // 2} for layer 1"
    with pytest.raises(ValueError, match=f"{told}.*give more, or a smaller `window`"):
        used(cache, [(0, 400)])


def test_counted_once_for_all_layers_of_a_step(monkeypatch) -> None:
    """And only when pages are sealed."""
    model = model_of("gpt_oss")
    limit = full_bytes(model, 400) // 2
    calls = []
    counted = HeldElsewhere._counted
    monkeypatch.setattr(HeldElsewhere, "_counted", lambda *args: calls.append(1) or counted(*args))
    cache = PiKVCache(model, scheduler="knorm", budget=f"{limit}B", **SMALL)
    used(cache, [(0, 400)])
    calls.clear()
    used(cache, chunks(440, 400)[1:])
    assert len(calls) == 40 // SMALL["page_size"]
