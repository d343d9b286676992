"""Layers whose keys other layers reuse stay transformers' own, beside paged ones."""

import pytest
import torch
import transformers
from helpers import ONE_ROW, PADDED, SMALL, assert_same, dynamic, generate, prompt, slabs_of
from transformers.cache_utils import get_layer_types_and_kwargs
from zoo import build

from pikv_hf import PiKVCache
from pikv_hf.layer.paged_layer import PagedLayer


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
        assert isinstance(cache.layers[0], PagedLayer) and slabs_of(cache.layers[0])


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="new in transformers 5.24")
@pytest.mark.parametrize(("mode", "is_paged"), [("per_loop", True), ("last_loop", False)])
def test_looped_model(mode: str, is_paged: bool):
    """Loops of dory write to copies of a layer, or read the keys that the last loop has cached."""
    config = transformers.DoryConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        n_input_layers=1,
        n_output_layers=1,
        layer_types=["sliding_attention", *["full_attention"] * 3],
        recurrent_kv_cache_mode=mode,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    model = transformers.DoryForCausalLM(config).eval()
    inputs = prompt(model, ONE_ROW)
    cache = PiKVCache(model, **SMALL)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))
    assert any(isinstance(layer, PagedLayer) for layer in cache.layers) == is_paged
