"""Parts of a model that stay on one device: they cover it once."""

import pytest
import torch
from zoo import build

from pikv_hf.model.blocks import blocks

NAMES = (
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "jamba",
    "qwen3_vl_moe",
    "longcat_flash",
)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_cover_every_tensor_once(name):
    model = build(name)
    names = [name for block in blocks(model) for name in block.names]
    for tensor in model.state_dict():
        assert sum(tensor == name or tensor.startswith(f"{name}.") for name in names) == 1, tensor
    weights = [*model.parameters(), *model.buffers()]
    assert sum(block.nbytes for block in blocks(model)) == sum(t.nbytes for t in weights)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_layers_are_whole_and_know_their_cache_layers(name):
    model = build(name)
    found = {n: block.layers for block in blocks(model) for n in block.names if block.layers}
    count = model.get_decoder().config.get_text_config().num_hidden_layers
    layers = [layer for part in found.values() for layer in part]
    assert sorted(layers) == [*range(len(layers))] and len(layers) % count == 0
    assert all(n.rpartition(".")[2].isdigit() for n in found)


def test_tied_weights_are_in_one_block():
    tied = build("mixtral", tie_word_embeddings=True)
    free = build("mixtral")
    head = free.lm_head.weight.nbytes
    assert blocks(tied)[0].names == ("model.embed_tokens", "lm_head")
    total = sum(block.nbytes for block in blocks(free))
    assert sum(block.nbytes for block in blocks(tied)) == total - head


def test_classes_that_may_not_be_split():
    model = build("mixtral")
    assert [block.names for block in blocks(model, ["MixtralModel"])] == [("model",), ("lm_head",)]
    split = {name for block in blocks(model, ["MixtralAttention"]) for name in block.names}
    assert {"model.layers.0.self_attn", "model.layers.0.mlp"} <= split
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert [b.names for b in blocks(empty)] == [b.names for b in blocks(model)]
