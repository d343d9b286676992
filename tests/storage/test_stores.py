"""Pages of a layer lie in few stores, however many tokens are generated."""

import pytest
import torch
from helpers import slabs_of, tiny

from pikv_hf import PiKVCache
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.paged_layer import PagedLayer

TOKENS = 32_000


def read(layer: PagedLayer, states: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Give a layer tokens of `states` [2, B, H, T, D]; `mask` [B, columns] hides padding."""
    layer.update(*states)
    assert take_layer() is layer
    layer.note_columns(mask, states.shape[3])
    layer.finish()
    layer.state.step.release()


@pytest.mark.parametrize("compressor", [None, "int4"])
def test_after_many_generated_tokens(compressor) -> None:
    layer = PiKVCache(tiny("mixtral"), compressor=compressor, page_size=64).layers[0]
    text = torch.randn(2, 1, 1, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    most = 0
    for token in text.split(1, dim=3):
        read(layer, token)
        most = max(most, len(slabs_of(layer)))
    assert 1 <= most <= 4
    capacity, held = (
        sum(getattr(s, name) for s in slabs_of(layer)) for name in ("capacity", "length")
    )
    assert TOKENS - 1024 <= held <= capacity <= 1.06 * held
    if compressor is None:
        spans = layer.state.pages.spans([0])
        for number, name in enumerate(("keys", "values")):
            assert torch.equal(torch.cat([s[name] for s in spans], 2)[0], text[number, 0, :, :held])


def test_rows_of_different_lengths() -> None:
    layer = PiKVCache(tiny("mixtral"), page_size=4, window=4).layers[0]
    text = torch.randn(2, 3, 2, 700, 8, generator=torch.Generator().manual_seed(0))
    pads = torch.tensor([0, 9, 17])
    mask = torch.arange(700) >= pads[:, None]
    read(layer, text[:, :, :, :100], mask[:, :100])
    for at in range(100, 700):
        read(layer, text[:, :, :, at : at + 1], mask[:, : at + 1])
    assert len(slabs_of(layer)) <= 4 and not any(slab.is_even for slab in slabs_of(layer)[:1])
    for row, start in enumerate(pads.tolist()):
        spans = layer.state.pages.spans([row])
        keys = torch.cat([span["keys"] for span in spans], dim=2)[0]
        assert torch.equal(keys, text[0, row, :, start : start + keys.shape[1]])
        assert keys.shape[1] == layer.state.num_departed[row] > 600
