"""Every mode of `generate` gives the same tokens and logits as with a DynamicCache."""

import copy
import functools
import io

import peft
import pytest
import torch
from helpers import (
    FAMILIES,
    ONE_ROW,
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    generate,
    paged,
    slabs_of,
    tiny,
)
from transformers import DynamicCache, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

STATELESS = [name for name in FAMILIES if name != "qwen3_next"]  # those that may draft
NO_SDPA = ("gpt_oss", "sdpa")
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 40},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "chunked_prefill": {"prefill_chunk_size": 7},
    "finished_rows": {"eos_token_id": list(range(60, 70)), "pad_token_id": 0},
}

padding = pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
families = pytest.mark.parametrize("name", FAMILIES)


@families
@padding
@pytest.mark.parametrize("mode", MODES)
def test_mode(name, lengths, mode) -> None:
    model, options = tiny(name), MODES[mode]
    inputs = prompt(model, lengths)
    expected = generate(model, inputs, dynamic(model), **options)
    cache = PiKVCache(model, **SMALL)
    assert_same(generate(model, inputs, cache, **options), expected)
    if expected.tokens.shape[1] == max(lengths) + 14:
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


def continued(inputs, tokens, turn):
    said = prompt(tiny("mixtral"), (5,) * len(tokens), seed=turn + 10)["input_ids"]
    ids = torch.cat([tokens, said], dim=1)
    new = torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}


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


@pytest.mark.parametrize(
    "name, attn",
    [(name, attn) for name in FAMILIES for attn in ("eager", "sdpa") if (name, attn) != NO_SDPA],
)
def test_bf16(name, attn) -> None:
    """As far from an fp32 run as the default cache is, in the median over 8 rows."""
    model = build(name, attn, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    ids = prompt(model, (40,) * 8)["input_ids"]
    logits = {}
    with torch.no_grad():
        for key, m, cache in [
            ("exact", exact, dynamic(exact)),
            ("default", model, dynamic(model)),
            ("pikv", model, PiKVCache(model, **SMALL)),
        ]:
            steps = [ids[:, :24], *ids[:, 24:].split(1, dim=1)]
            out = [m(step, **with_cache(cache)).logits[:, -1].float() for step in steps]
            logits[key] = torch.stack(out)
    default = (logits["default"] - logits["exact"]).abs().median()
    ours = (logits["pikv"] - logits["exact"]).abs().median()
    assert 0 < ours <= 1.2 * default, (ours, default)
    assert paged(cache)[0].state.tail.keys.dtype == torch.bfloat16
    assert slabs_of(paged(cache)[0])[0].fields["keys"].dtype == torch.bfloat16


@families
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")  # of peft itself
@pytest.mark.parametrize("given", ["wrapped", "inner"])
def test_peft(name, given) -> None:
    """With LoRA on every projection, the latent one that we read ourselves included."""
    model = build(name)
    targets = [
        n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "lm_head" not in n
    ]
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    inputs = prompt(model, PADDED)
    expected = generate(wrapped, inputs, dynamic(model))
    cache = PiKVCache(wrapped if given == "wrapped" else model, **SMALL)
    assert_same(generate(wrapped, inputs, cache), expected)
    assert_sealed_in_prefill_and_decode(cache, max(PADDED))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_compiled(name) -> None:
    """`torch.compile` with a backend that needs no compiler; the graph breaks at our code."""
    model = build(name, num_hidden_layers=2)
    inputs = prompt(model, (13, 10))
    expected = generate(model, inputs, dynamic(model))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    cache = PiKVCache(compiled, **SMALL)
    assert_same(generate(compiled, inputs, cache), expected)
    cache.reset()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        ours = compiled(**inputs, **with_cache(cache)).logits
        theirs = model(**inputs, **with_cache(dynamic(model))).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()])
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_compiled_in_one_graph_beside_a_cache_of_ours(name) -> None:
    """Calls with another cache: neither while ours is there, nor once it was used, the graph breaks."""
    model = build(name, num_hidden_layers=2)
    model.set_experts_implementation("grouped_mm")
    inputs = prompt(model, (13,))
    cache = PiKVCache(model, router="all", **SMALL)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def logits(called, other):
        with torch.no_grad():
            return called(**inputs, **with_cache(other)).logits

    def static():
        return StaticCache(config=model.config, max_cache_len=32)

    expected = logits(model, static())
    assert torch.equal(logits(compiled, static()), expected)
    assert_close(logits(model, cache), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(logits(compiled, static()), expected)
    torch.compiler.reset()


@families
def test_two_caches_in_turn(name) -> None:
    """Two PiKVCaches and a DynamicCache, step by step in turn on one model."""
    model = tiny(name)
    prompts = [prompt(model, PADDED, seed=s) for s in range(3)]
    alone = [step_by_step(model, inputs, dynamic(model)) for inputs in prompts]
    caches = [PiKVCache(model, **SMALL), dynamic(model), PiKVCache(model, page_size=3, window=5)]
    runs = [step_by_step(model, *pair) for pair in zip(prompts, caches, strict=True)]
    for step in zip(*runs, *alone, strict=True):
        for ours, theirs in zip(step[:3], step[3:], strict=True):
            assert_close(ours, theirs)
    assert isinstance(caches[1], DynamicCache)
    assert_sealed_in_prefill_and_decode(caches[0], 30)


def step_by_step(model, inputs, cache, steps=12):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            logits = model(
                ids, attention_mask=mask, position_ids=positions, **with_cache(cache)
            ).logits[:, -1]
        yield logits
        ids = logits.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts(context) -> None:
    """A cache filled under inference mode is continued outside of it, and the other way round."""
    model = tiny("mixtral")
    ids = prompt(model, (40,))["input_ids"]
    expected = torch.cat(list(prefixes(model, ids, dynamic(model), torch.no_grad)), dim=1)
    for first, then in [(context, torch.no_grad), (torch.no_grad, context)]:
        cache = PiKVCache(model, **SMALL)
        got = [*prefixes(model, ids[:, :25], cache, first)]
        got += [*prefixes(model, ids[:, 25:], cache, then)]
        assert_close(torch.cat(got, dim=1).detach(), expected)


def prefixes(model, ids, cache, context):
    for chunk in (ids[:, :9], *ids[:, 9:].split(3, dim=1)):
        with context():
            yield model(chunk, **with_cache(cache)).logits
