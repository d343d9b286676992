"""As with a DynamicCache whatever is around: bf16, peft, compiled, in turn, contexts."""

import copy

import peft
import pytest
import torch
from conversations import families
from helpers import (
    FAMILIES,
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
from transformers import StaticCache
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

NO_SDPA = ("gpt_oss", "sdpa")


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
