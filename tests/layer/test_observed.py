"""The newest queries that a method gets: those that the model asked, however its tokens came in."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from helpers import ONE_ROW, PADDED, forward, paged, queries_of, tiny
from tolerances import SUMS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Identity

WINDOW, PAGE, SEEN = 3, 4, 5


@dataclass(frozen=True)
class Spy(Identity):
    """Lossless; notes the queries that it is given."""

    observed_queries: ClassVar[int] = SEEN
    given: list = field(default_factory=list, compare=False)

    def encode_observed(self, keys, values, queries):
        self.given.append(queries)
        return self.encode(keys, values)


def asked(name, inputs, **fields) -> list[torch.Tensor]:
    """The queries [B, H, G, T, D] that each layer of the plain model asks in one forward pass."""
    model, queries = build(name, "eager", **fields), []
    eager = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, mask, **options):
        queries.append(query.unflatten(1, (key.shape[1], -1)))
        return eager(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("record", record)
    ALL_MASK_ATTENTION_FUNCTIONS.register("record", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "record"
    forward(model, inputs["input_ids"], inputs["attention_mask"], None)
    return queries


@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("step", [100, 1, 2, 7])
def test_queries_are_those_of_the_newest_tokens(lengths, step) -> None:
    model, spy = tiny("mixtral"), Spy()
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    everything, compared = asked("mixtral", inputs), 0
    cache = PiKVCache(model, compressor=spy, page_size=PAGE, window=WINDOW)
    for start in range(0, ids.shape[1], step):
        end = min(start + step, ids.shape[1])
        spy.given.clear()
        forward(model, ids[:, start:end], mask[:, :end], cache)
        for layer, queries in zip(paged(cache), everything, strict=True):
            expected = queries[:, :, :, max(end - SEEN, 0) : end]
            expected = expected * mask[:, None, None, max(end - SEEN, 0) : end, None]
            assert torch.allclose(queries_of(layer), expected, atol=SUMS)
        given = [queries for queries in spy.given if queries.shape[0] == len(lengths)]
        for queries, layer in zip(given, paged(cache), strict=False):
            assert torch.equal(queries, queries_of(layer).flatten(2, 3) * layer.state.scale)
            compared += 1
    # The rows of a padded prompt are sealed one by one.
    assert compared or lengths == PADDED, "no queries of all rows were given"
    assert cache.nbytes > PiKVCache(model).nbytes


def test_rows_and_crops_are_followed() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (12, 12))
    cache = PiKVCache(model, compressor=Spy(), page_size=PAGE, window=WINDOW)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    before = [queries_of(layer) for layer in paged(cache)]
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-2)
    for layer, queries in zip(paged(cache), before, strict=True):
        assert torch.equal(queries_of(layer), queries[[1, 1], :, :, : SEEN - 2])


def test_latent_queries_score_the_latents() -> None:
    """Queries of MLA layers are absorbed: their products with latents are those with the keys."""
    model, spy = tiny("deepseek_v3"), Spy()
    inputs = prompt(model, ONE_ROW)
    cache = PiKVCache(model, compressor=spy, page_size=PAGE, window=WINDOW)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    for layer, queries in zip(paged(cache), asked("deepseek_v3", inputs), strict=True):
        module = model.model.layers[layer.state.layer_idx].self_attn
        latents = layer.states()[0]
        rotary = layer.states()[1]
        up = module.kv_b_proj(latents[:, 0]).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        nope = up[..., : module.qk_nope_head_dim]
        keys = torch.cat([nope, rotary.expand(-1, module.num_heads, -1, -1)], dim=-1)
        newest = queries[:, :, 0, -SEEN:]
        expected = newest @ keys.transpose(-1, -2)
        both = torch.cat([latents, rotary], dim=-1)
        absorbed = queries_of(layer)[:, 0] @ both.transpose(-1, -2)
        assert torch.allclose(absorbed, expected, atol=SUMS)
