"""What attaching changes on a model, and that all of it is taken back."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    FAMILIES,
    NEW_TOKENS,
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    dynamic,
    generate,
    tiny,
)
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

families = pytest.mark.parametrize("name", FAMILIES)


def fingerprint(model):
    """Everything of a model that a cache could change: identities, hooks, attributes, weights."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {
            key: len(value) if key.endswith("hooks") or "hooks_" in key else id(value)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        modules[name] = (type(module), attributes, type(module).forward)
    state = {
        key: (id(value), value.data_ptr())
        for key, value in model.state_dict(keep_vars=True).items()
    }
    configs = [vars(m.config).copy() for m in model.modules() if hasattr(m, "config")]
    return modules, state, [str(c) for c in configs], vars(model.generation_config).copy()


@families
@pytest.mark.parametrize("way", ["detach", "with", "del", "error_in_with"])
def test_restored_exactly(name, way) -> None:
    model = build(name)
    before = fingerprint(model)
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    cache = PiKVCache(model, router="all", **SMALL)
    assert fingerprint(model) != before
    assert "generate" in vars(model)
    generate(model, inputs, cache)
    if way == "detach":
        cache.detach()
        cache.detach()
    elif way == "with":
        with cache:
            generate(model, {"input_ids": prompt(model, (70,))["input_ids"]}, PiKVCache(model))
    elif way == "error_in_with":
        with pytest.raises(KeyError), cache:
            raise KeyError
    del cache
    gc.collect()
    assert "generate" not in vars(model)
    after = fingerprint(model)
    for left, right in zip(before, after, strict=True):
        assert left == right
    assert_same(generate(model, inputs, dynamic(model)), expected)


@families
def test_default_cache_while_attached(name) -> None:
    """Bit for bit: calls that are not ours go to the original attention, with its config."""
    model = build(name)
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    cache = PiKVCache(model, **SMALL)
    actual = generate(model, inputs, dynamic(model))
    assert torch.equal(actual.logits, expected.logits)
    with torch.no_grad():
        attached = model(**inputs, use_cache=False).logits
        cache.detach()
        assert torch.equal(attached, model(**inputs, use_cache=False).logits)


def test_attention_weights_while_attached() -> None:
    model = build("mixtral")
    inputs = prompt(model, PADDED)
    cache = PiKVCache(model)
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    assert weights is not None and all(w is not None for w in weights)
    del cache


def test_the_model_config_is_untouched() -> None:
    model = build("mixtral", "sdpa")
    config, text = model.config, model.config.to_dict()
    cache = PiKVCache(model)
    assert model.config is config and config.to_dict() == text
    assert config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == build("mixtral").state_dict().keys()
    model.set_attn_implementation("eager")  # switched while attached
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(model, inputs, PiKVCache(model, **SMALL)), expected)
    del cache


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_caches_share_one_binding(order) -> None:
    model = build("mixtral")
    before = fingerprint(model)
    caches = [PiKVCache(model, **SMALL)]
    attached = fingerprint(model)
    caches.append(PiKVCache(model, **SMALL))
    assert fingerprint(model) == attached, "each cache brought hooks of its own"
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    first, second = order
    caches[first].detach()
    assert "generate" in vars(model)
    assert_same(generate(model, inputs, caches[second]), expected)
    caches[second].detach()
    assert fingerprint(model) == before


def test_the_last_cache_goes_while_another_comes(monkeypatch) -> None:
    """As a thread, or the garbage collector, may have it: in the middle of a construction."""
    model = build("mixtral")
    before = fingerprint(model)
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    old, fill = PiKVCache(model, **SMALL), PiKVCache.fill

    def interrupted(*args):
        old.detach()
        return fill(*args)

    with monkeypatch.context() as patch:
        patch.setattr(PiKVCache, "fill", interrupted)
        first = PiKVCache(model, **SMALL)
    second = PiKVCache(model, **SMALL)
    second.detach()
    assert_same(generate(model, inputs, first), expected)
    first.detach()
    assert fingerprint(model) == before


def test_collected_with_its_model() -> None:
    """A cache does not keep its model alive, nor the binding the cache."""
    model = build("mixtral")
    cache = PiKVCache(model, router="all", **SMALL)
    generate(model, prompt(model, PADDED), cache)
    refs = weakref.ref(model), weakref.ref(cache)
    del model
    gc.collect()
    assert refs[0]() is None and cache.model is None
    repr(cache), cache.nbytes, cache.detach()
    del cache
    gc.collect()
    assert refs[1]() is None


def test_attach_again() -> None:
    model = build("mixtral")
    inputs = prompt(model, PADDED)
    cache = PiKVCache(model, **SMALL)
    reference = dynamic(model)
    tokens = generate(model, inputs, reference).tokens
    generate(model, inputs, cache)
    cache.detach()
    assert cache.model is None and cache.get_seq_length() == tokens.shape[1] - 1
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW_TOKENS).long()], dim=1)
    full = {"input_ids": tokens, "attention_mask": mask}
    assert cache.attach(model) is cache
    assert_same(generate(model, full, cache), generate(model, full, reference))


@families
def test_deepcopy_of_an_attached_model(name) -> None:
    """The copy is a plain model; a cache of its own can be attached to it, and knows its tokens."""
    model = build(name)
    cache = PiKVCache(model, **SMALL)
    twin = copy.deepcopy(model)
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(twin, inputs, dynamic(twin)), expected)
    with pytest.raises(ValueError, match=r"PiKVCache\(model\)"):
        generate(twin, inputs, cache)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(0.9)
    changed = generate(twin, inputs, dynamic(twin))
    own = PiKVCache(twin, **SMALL)
    assert_same(generate(twin, inputs, own), changed)
    with pytest.raises(ValueError, match="does not begin with the"):
        generate(twin, prompt(twin, (60,) * 3, seed=1), own)
    assert_same(generate(model, inputs, cache), expected)
    own.detach()
    cache.detach()
    assert_same(generate(twin, inputs, dynamic(twin)), changed)
    assert_same(generate(model, inputs, dynamic(model)), expected)


@families
def test_routing_is_bit_identical(name) -> None:
    """Gates see the same input bits as long as attention is the model's own: in the prefill."""
    model = build(name)
    inputs = prompt(model, PADDED)

    def routed(cache):
        with torch.no_grad():
            return model(**inputs, **with_cache(cache), output_router_logits=True).router_logits

    expected = routed(dynamic(model))
    actual = routed(PiKVCache(model, router="all", **SMALL))
    assert len(expected) == len(actual) > 0
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@families
def test_recording_labels_changes_nothing(name) -> None:
    model = build(name)
    inputs = prompt(model, PADDED)
    plain, labelled = (
        generate(model, inputs, PiKVCache(model, router=router, **SMALL))
        for router in (None, "all")
    )
    assert torch.equal(plain.logits, labelled.logits)


@families
def test_threads(name) -> None:
    """Two threads, each with its cache, on one model: the results of one thread."""
    model = tiny(name)
    prompts = [prompt(model, PADDED, seed=s) for s in range(2)]
    expected = [greedy(model, inputs, dynamic(model)) for inputs in prompts]
    barrier = threading.Barrier(2)

    def work(inputs):
        barrier.wait()
        runs = []
        for _ in range(3):
            cache = PiKVCache(model, router="all", **SMALL)
            runs.append(greedy(model, inputs, cache))
            del cache
        return runs

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, prompts, timeout=60))
    for runs, logits in zip(results, expected, strict=True):
        for run in runs:
            assert_close(run, logits)
    gc.collect()
    assert "generate" not in vars(model)


def greedy(model, inputs, cache, steps=12):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    out = []
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            logits = model(
                ids, attention_mask=mask, position_ids=positions, **with_cache(cache)
            ).logits[:, -1]
        out.append(logits)
        ids = logits.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(out)


def test_an_interrupted_forward() -> None:
    """Ctrl-C in the middle of a forward: the next use of the cache says what to do."""
    model = build("mixtral")
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    cache = PiKVCache(model, router="all", **SMALL)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, cache)
    handle.remove()
    with pytest.raises((RuntimeError, ValueError), match="reset"):
        generate(model, inputs, cache)
    other = PiKVCache(model, **SMALL)
    assert_same(generate(model, inputs, other), expected)
    cache.reset()
    assert_same(generate(model, inputs, cache), expected)


def test_training_with_a_cache_attached() -> None:
    """Gradients of a model in training are those without the cache."""
    model = build("mixtral")
    ids = prompt(model, (20,))["input_ids"]

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    cache = PiKVCache(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    del cache
