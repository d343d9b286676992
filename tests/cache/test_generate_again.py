"""A filled cache goes on as a DynamicCache does: chats, new ids, one document, copies."""

import copy
import io

import pytest
import torch
from conversations import STATELESS, continued, families, padding
from helpers import SMALL, assert_same, assert_sealed_in_prefill_and_decode, dynamic, generate, tiny
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("count", [5, 60], ids=["fewer", "more"])
def test_embeddings_with_other_ids(name, count) -> None:
    """Embeddings of the whole text continue the cache; ids beside them only begin the output."""
    model = tiny(name)
    first, text = (prompt(model, (n,))["input_ids"] for n in (20, 40))
    ids = prompt(model, (count,), seed=3)["input_ids"]
    outs = []
    for cache in (PiKVCache(model, **SMALL), dynamic(model)):
        options = {"max_new_tokens": 8, **with_cache(cache)}
        model.generate(inputs_embeds=model.get_input_embeddings()(first), **options)
        whole = {"inputs_embeds": model.get_input_embeddings()(text)}
        mask = torch.ones_like(text)
        outs.append(model.generate(ids, **whole, attention_mask=mask, **options))
    assert outs[0].shape[1] == count + 8
    assert torch.equal(*outs)


@families
@padding
def test_chat(name, lengths) -> None:
    """Turn by turn on a filled cache, with the full ids; then the same cache after `reset()`."""
    model = tiny(name)
    inputs = first = prompt(model, lengths)
    cache, reference = PiKVCache(model, **SMALL), dynamic(model)
    for turn in range(3):
        expected = generate(model, inputs, reference)
        actual = generate(model, inputs, cache)
        assert_same(actual, expected)
        inputs = continued(inputs, actual.tokens, turn)
    assert_sealed_in_prefill_and_decode(cache, max(lengths))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(
        layer["nbytes"] == 0 for layer in cache.report().to_dict()["layers"] if layer["paged"]
    )
    assert_same(generate(model, first, cache), generate(model, first, dynamic(model)))


@families
@padding
def test_only_new_ids_with_the_full_mask(name, lengths) -> None:
    model = tiny(name)
    inputs = prompt(model, lengths)
    cache, reference = PiKVCache(model, **SMALL), dynamic(model)
    results = []
    for held in (cache, reference):
        tokens = generate(model, inputs, held).tokens
        full = continued(inputs, tokens, 0)
        new = {**full, "input_ids": full["input_ids"][:, held.get_seq_length() :]}
        results.append(generate(model, new, held))
    assert_same(*results)


@pytest.mark.parametrize("name", STATELESS)  # a linear-attention layer cannot be repeated
def test_one_document_for_several_questions(name) -> None:
    """A filled cache is repeated for a batch of continuations."""
    model = tiny(name)
    document = prompt(model, (24,))
    cache, reference = PiKVCache(model, **SMALL), dynamic(model)
    results = []
    for held in (cache, reference):
        with torch.no_grad():
            model(**document, **with_cache(held))
        held.batch_repeat_interleave(3)
        tokens = document["input_ids"].repeat(3, 1)
        questions = prompt(model, (5, 5, 5), seed=3)["input_ids"]
        results.append(generate(model, {"input_ids": torch.cat([tokens, questions], 1)}, held))
    assert_same(*results)


@families
@padding
@pytest.mark.parametrize("how", ["deepcopy", "save", "pickle_detached"])
def test_copies(name, lengths, how) -> None:
    """A copy continues as the original does, and neither writes into the other."""
    model = tiny(name)
    inputs = prompt(model, lengths)
    cache, reference = PiKVCache(model, **SMALL), dynamic(model)
    tokens = generate(model, inputs, reference).tokens
    generate(model, inputs, cache)
    if how == "deepcopy":
        twin = copy.deepcopy(cache)
    else:
        if how == "pickle_detached":
            cache.detach()
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False).attach(model)
        if how == "pickle_detached":
            cache.attach(model)
    inputs = continued(inputs, tokens, 0)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 99 - other["input_ids"][:, -1]
    expected_other = generate(model, other, copy.deepcopy(reference))
    expected = generate(model, inputs, reference)
    assert_same(generate(model, other, twin), expected_other)
    assert_same(generate(model, inputs, cache), expected)
