"""Every mode of `generate` gives the same tokens and logits as with a DynamicCache."""

import functools

import pytest
import torch
from conversations import STATELESS, families, padding
from helpers import (
    FAMILIES,
    ONE_ROW,
    SMALL,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    generate,
    paged,
    slabs_of,
    tiny,
)
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 40},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "chunked_prefill": {"prefill_chunk_size": 7},
    "finished_rows": {"eos_token_id": list(range(60, 70)), "pad_token_id": 0},
}


@families
@padding
@pytest.mark.parametrize("mode", MODES)
def test_mode(name, lengths, mode) -> None:
    model, options = tiny(name), MODES[mode]
    inputs = prompt(model, lengths)
    expected = generate(model, inputs, dynamic(model), **options)
    cache = PiKVCache(model, **SMALL)
    assert_same(generate(model, inputs, cache, **options), expected)
    if mode != "finished_rows":
        assert_sealed_in_prefill_and_decode(cache, max(lengths))
    assert slabs_of(paged(cache)[0])


@pytest.mark.parametrize(
    "name, mode",
    [
        *((name, "greedy") for name in FAMILIES),
        ("mixtral", "beams"),
        ("mixtral", "chunked_prefill"),
    ],
)
def test_prompts_that_end_with_padding(name, mode) -> None:
    """Padded on the right, or nothing but padding: as DynamicCache, however it counts positions."""
    model, options = tiny(name), MODES[mode] | {"max_new_tokens": 8}
    ids, mask = prompt(model, (30, 30, 30)).values()
    mask[1, 25:] = 0
    mask[2] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    expected = generate(model, inputs, dynamic(model), **options)
    assert_same(generate(model, inputs, PiKVCache(model, **SMALL), **options), expected)
    tokens = type(model).generate(  # as `model.generate(..., cache=PiKVCache(model))` looks it up
        model, **inputs, **with_cache(PiKVCache(model, **SMALL)), **options
    )
    assert torch.equal(tokens, expected.tokens)


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
def test_drafting(name, pads, mode, monkeypatch) -> None:
    """Some drafted tokens are taken and some are taken back; equal to plain greedy decoding."""
    model = tiny(name)
    inputs = repetitive_prompt(model, pads)
    drafter = {"prompt_lookup_num_tokens": 3}
    if mode == "assistant":
        drafter = {"assistant_model": disturbed(name)}
    expected = generate(model, inputs, dynamic(model), max_new_tokens=60)
    cache = PiKVCache(model, **SMALL)
    crops: list[int] = []
    monkeypatch.setattr(
        cache, "crop", lambda n: (crops.append(n), PiKVCache.crop(cache, n)), raising=False
    )
    assert_same(generate(model, inputs, cache, max_new_tokens=60, **drafter), expected)
    assert min(crops) < 0, "no drafted token was rejected"
    assert len(crops) < 60, "no drafted token was accepted"
    assert_sealed_in_prefill_and_decode(cache, inputs["input_ids"].shape[1])


def repetitive_prompt(model, pads):
    """A prompt with repeated parts, so that looking up finds drafts."""
    part = prompt(model, (8,), seed=7)["input_ids"]
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.int64), part, part, part[:, :3]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def disturbed(name):
    """A drafter that is right now and then: the model with noise on its weights."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std().nan_to_num() * 0.1)
    return model


@families
@padding
def test_inputs_embeds(name, lengths) -> None:
    model = tiny(name)
    inputs = prompt(model, lengths)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"] = embeds.detach()
    expected = generate(model, inputs, dynamic(model))
    cache = PiKVCache(model, **SMALL)
    assert_same(generate(model, inputs, cache), expected)
    assert_sealed_in_prefill_and_decode(cache, max(lengths))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@families
def test_streamer_and_stopping_criteria(name) -> None:
    model = tiny(name)
    inputs = prompt(model, ONE_ROW)
    results, streams = [], []
    for cache in (PiKVCache(model, **SMALL), dynamic(model)):
        streams.append(Recorder())
        options = {"streamer": streams[-1], "stopping_criteria": [StopAt(40)]}
        results.append(generate(model, inputs, cache, **options))
    assert_same(*results)
    assert results[0].tokens.shape[1] == 40
    assert streams[0].tokens == streams[1].tokens == [*results[0].tokens[0].tolist(), -1]
