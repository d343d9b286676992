"""Pages of different encodings: another number of each in every row and head, nothing lost."""

import pytest
import torch
from helpers import (
    FAMILIES,
    ONE_ROW,
    PADDED,
    SMALL,
    Scattered,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    generate,
    paged,
    slabs_of,
    tiny,
)
from pikv_kernels import merge_segments, merge_segments_reference, partial_attention
from tolerances import ATTENTION, FLOAT32, LSE, SUMS
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import StreamingLLM
from pikv_hf.storage.ragged_pages import RaggedPages

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}


def mixed(model, **options) -> PiKVCache:
    return PiKVCache(model, compressor=Scattered(), **SMALL, **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("mode", MODES)
def test_equal_to_a_dynamic_cache(name, lengths, mode) -> None:
    model = tiny(name)
    inputs = prompt(model, lengths)
    expected = generate(model, inputs, dynamic(model), **MODES[mode])
    cache = mixed(model)
    assert_same(generate(model, inputs, cache, **MODES[mode]), expected)
    pools = [slab for layer in paged(cache) for slab in slabs_of(layer)]
    assert all(isinstance(pool, RaggedPages) for pool in pools)
    assert len({tuple(row) for pool in pools for row in pool.held().tolist()}) > 1
    if mode == "greedy":
        assert_sealed_in_prefill_and_decode(cache, inputs["input_ids"].shape[1])


def test_taking_back_drafted_tokens() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, ONE_ROW)
    inputs = {k: torch.cat([v, v[:, 5:]], dim=1) for k, v in inputs.items()}
    expected = generate(model, inputs, dynamic(model), max_new_tokens=40)
    drafted = generate(model, inputs, mixed(model), max_new_tokens=40, prompt_lookup_num_tokens=3)
    assert_same(drafted, expected)


@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
def test_a_scheduler_drops_the_same_tokens(lengths) -> None:
    model = tiny("mixtral")
    inputs, scheduler = prompt(model, lengths), StreamingLLM(sinks=2)
    plain = PiKVCache(model, scheduler=scheduler, budget=16, **SMALL)
    expected = generate(model, inputs, plain)
    cache = mixed(model, scheduler=scheduler, budget=16)
    assert_same(generate(model, inputs, cache), expected)
    assert [layer.state.held_tokens() for layer in paged(cache)] == [
        layer.state.held_tokens() for layer in paged(plain)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_merge_segments(dtype, size) -> None:
    """Any number of parts in any order gives attention over all keys of the owner."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    owner = torch.tensor([2, 0, 2, 3, 0, 2, 5])
    query, keys, values = draw(6, 3, 8) * size, draw(7, 4, 8), draw(7, 4, 5)
    out, lse = partial_attention(query[owner, None], keys[:, None], values[:, None], None, 0.3)
    merged, together = merge_segments(out[:, 0], lse[:, 0].to(dtype), owner, 6)
    reference, reference_lse = merge_segments_reference(out[:, 0], lse[:, 0].to(dtype), owner, 6)
    for row in range(6):
        mine = owner == row
        if not mine.any():
            assert (merged[row] == 0).all() and (together[row] == -torch.inf).all()
            continue
        scores = query[row].double() @ keys[mine].flatten(0, 1).double().T * 0.3
        expected = scores.softmax(-1) @ values[mine].flatten(0, 1).double()
        assert (merged[row] - expected).abs().max() <= ATTENTION
        assert (merged[row] - reference[row]).abs().max() <= LSE
        assert torch.allclose(together[row].double(), scores.logsumexp(-1), rtol=FLOAT32, atol=SUMS)
        assert torch.allclose(together[row], reference_lse[row])
