"""Keys and values of different dtypes, as transformers 5.24 caches them: exact, paged or not."""

from collections.abc import Iterator

import pytest
import torch
from helpers import SMALL, assert_close, dynamic, forward, padded_prompt
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from zoo import build

from pikv_hf import PiKVCache

WIDE = {"keys": ("q_norm", "k_norm"), "values": ("v_proj",)}


def casting(module, query, key, value, mask, **kwargs):
    """sdpa of the wider dtype, in the query's; the layer hands over what it was given."""
    assert {key.dtype, value.dtype} == {torch.float32, torch.float64}
    assert key.dtype == query.dtype
    wide = torch.promote_types(query.dtype, value.dtype)
    states = (states.to(wide) for states in (query, key, value))
    out, _ = sdpa_attention_forward(module, *states, mask, **kwargs)
    return out.to(torch.float32), None


@pytest.fixture(params=WIDE)
def mixed(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """A model whose keys, or values, are float64 and the others float32."""
    AttentionInterface.register("casting", casting)
    AttentionMaskInterface.register("casting", sdpa_mask)
    model = build("qwen3_moe", "casting")
    for name, module in model.named_modules():
        if name.endswith(WIDE[request.param]):
            module.register_forward_hook(lambda module, args, out: out.double())
        elif isinstance(module, nn.Linear) and name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return model


def test_same_as_dynamic_cache(mixed: PreTrainedModel):
    ids, mask = padded_prompt(mixed, (40, 33))
    cache, full = PiKVCache(mixed, **SMALL), dynamic(mixed)
    for start, end in ((0, 21), (21, 38), (38, 39), (39, 40)):
        ours, theirs = (
            forward(mixed, ids[:, start:end], mask[:, :end], held) for held in (cache, full)
        )
        assert_close(ours, theirs)
