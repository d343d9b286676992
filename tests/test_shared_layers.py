"""Layers whose keys other layers reuse stay transformers' own, beside paged ones."""

import pytest
from helpers import ONE_ROW, PADDED, SMALL, assert_same, dynamic, generate, prompt
from transformers.cache_utils import get_layer_types_and_kwargs
from zoo import build

from pikv_hf import PiKVCache
from pikv_hf.layer import PagedLayer


@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_reused_keys(attn, lengths) -> None:
    """The last two of four full-attention layers of Gemma 4 read what layer 1 returned."""
    model = build("gemma4", attn, num_kv_shared_layers=2, layer_types=["full_attention"] * 4)
    inputs = prompt(model, lengths)
    cache = PiKVCache(model, **SMALL)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))
    assert not isinstance(cache.layers[1], PagedLayer)
    types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if "dummy" in types:  # before 5.23 the config does not say which layer is the one reused
        assert isinstance(cache.layers[0], PagedLayer) and cache.layers[0].pages.slabs
