"""Tokens that a scheduler moves to other pages keep the codes that they were given first."""

import pytest
import torch
from helpers import forward, held_by, paged, tiny
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Fp8, Int2, Int4, Int8, TurboQuant
from pikv_hf.schedulers import H2O, AdaKV, KeyDiff

PER_TOKEN = [Int8(), Int4(), Int2(symmetric=False), TurboQuant(3), TurboQuant(4, residual=True)]
TOKENS = 90
SCHEDULERS = {"keydiff": KeyDiff(), "ragged": AdaKV(KeyDiff()), "records": AdaKV(H2O())}


def codes_by_position(layer, row: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """The stored codes of each sealed token of a batch row, by KV head and position."""
    out = {}
    for span in layer.state.pages._spans([row], with_values=False):
        codes, heads = span.codes(), span["keys"].shape[1]
        positions = span["positions"].expand(1, heads, -1)[0]
        valid = span.all_valid()["valid"].expand(1, heads, -1)[0]
        for head, place in valid.nonzero().tolist():
            found = {name: t[0, head, place].clone() for name, t in codes.items()}
            out[head, int(positions[head, place])] = found
    return out


@pytest.mark.parametrize("compressor", PER_TOKEN, ids=str)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_codes_stay(compressor, name, scheduler) -> None:
    """Those of the first layer, whose keys do not depend on what was dropped: as with no scheduler."""
    # Keys of the size that turboquant can pack.
    fields = {"head_dim": 16} if name == "mixtral" else {}
    model = tiny(name, num_hidden_layers=1, **fields)
    inputs = prompt(model, (TOKENS, 80))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"compressor": compressor, "page_size": 4, "window": 5}
    whole = PiKVCache(model, **options | {"window": 1})
    cache = PiKVCache(model, scheduler=SCHEDULERS[scheduler], budget=30, **options)
    pieces = [(0, 50), (50, 60), *((at, at + 1) for at in range(60, TOKENS))]
    for start, end in pieces:
        for each in (whole, cache):
            forward(model, ids[:, start:end], mask[:, :end], each)
    whole.compress()
    for row in range(2):
        expected = codes_by_position(paged(whole)[0], row)
        actual = codes_by_position(paged(cache)[0], row)
        assert 0 < len(actual) < len(expected)
        assert any(position < 50 for _, position in actual), "nothing has been moved"
        for token, codes in actual.items():
            for field, tensor in codes.items():
                assert torch.equal(tensor, expected[token][field]), (token, field)


@pytest.mark.parametrize("compressor", [Fp8(), Int4(key_axis="channel")], ids=str)
def test_what_mixes_tokens_is_encoded_again(compressor) -> None:
    assert not compressor.is_per_token
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    cache = PiKVCache(
        model, scheduler="knorm", budget=30, compressor=compressor, page_size=4, window=4
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for start, end in [(0, 40), *((at, at + 1) for at in range(40, 60))]:
        assert forward(model, ids[:, start:end], mask[:, :end], cache).isfinite().all()
    assert held_by(paged(cache)[0], 0).tolist() == [26] * 2
