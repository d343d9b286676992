"""Gradients do not pass through the cache: training says so, and inference with gradients works."""

from functools import partial

import pytest
import torch
from helpers import FAMILIES, ONE_ROW, SMALL, assert_close, assert_same, dynamic, generate
from torch.utils.checkpoint import checkpoint
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

families = pytest.mark.parametrize("name", FAMILIES)


def assert_nothing_cached(model, cache) -> None:
    """It is as new: the same model reads any other text with it."""
    assert cache.get_seq_length() == cache.log.length == 0
    inputs = prompt(model, ONE_ROW, seed=7)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic(model)))


@families
@pytest.mark.parametrize("options", [SMALL, {}], ids=["pages", "tail"])
def test_a_gradient_through_the_cache_is_refused(name, options) -> None:
    """In eval mode, when it is asked for: until then this is inference."""
    model = build(name)
    ids = prompt(model, ONE_ROW)["input_ids"]
    caches = PiKVCache(model, **options), dynamic(model)
    outs = []
    for cache in caches:
        model(ids[:, :20], **with_cache(cache))
        outs.append(model(ids[:, 20:], labels=ids[:, 20:], **with_cache(cache)))
    assert_close(outs[0].logits.detach(), outs[1].logits.detach())
    with pytest.raises(RuntimeError, match="holds them without one: train with the whole text"):
        outs[0].loss.backward()


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_layers_that_are_not_read_by_us_refuse_it_too(name) -> None:
    """A mask for each head leaves all attention to the model."""
    model = build(name)
    ids = prompt(model, (20,))["input_ids"]
    mask = torch.zeros(1, 4, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -1e30)
    cache = PiKVCache(model)
    model(ids[:, :12], attention_mask=mask[:, :, :12, :12], **with_cache(cache))
    assert not cache.is_paged
    out = model(
        ids[:, 12:], attention_mask=mask[:, :, 12:], labels=ids[:, 12:], **with_cache(cache)
    )
    with pytest.raises(RuntimeError, match="holds them without one"):
        out.loss.backward()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_gradient_of_one_pass_is_whole(name) -> None:
    model = build(name)
    ids = prompt(model, ONE_ROW)["input_ids"]
    found = []
    for cache in (PiKVCache(model, **SMALL), dynamic(model)):
        model.zero_grad()
        model(ids, labels=ids, **with_cache(cache)).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs)


@families
def test_training_is_refused_before_anything_is_cached(name) -> None:
    model = build(name)
    cache = PiKVCache(model, **SMALL)
    ids = prompt(model, ONE_ROW)["input_ids"]
    soft = model.get_input_embeddings()(ids).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="`inputs_embeds` wants gradients"):
        model(inputs_embeds=soft, **with_cache(cache))
    model.train()
    with pytest.raises(RuntimeError, match="`model` is in training mode and wants gradients"):
        model(ids, labels=ids, **with_cache(cache))
    model.eval()
    assert_nothing_cached(model, cache)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_gradient_checkpointing_is_refused(name) -> None:
    """Layers are given no cache then, though no weight wants a gradient."""
    model = build(name).requires_grad_(False)
    cache = PiKVCache(model, **SMALL)
    model.train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    ids = prompt(model, ONE_ROW)["input_ids"]
    with pytest.raises(RuntimeError, match="cached nothing.*gradient checkpointing.*model.eval"):
        model(ids, **with_cache(cache))
    model.eval()
    assert_nothing_cached(model, cache)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_inference_in_training_mode(name) -> None:
    """Without gradients, or where no weight wants one."""
    model = build(name).train()
    inputs = prompt(model, ONE_ROW)
    assert_same(
        generate(model, inputs, PiKVCache(model, **SMALL)), generate(model, inputs, dynamic(model))
    )
    model.requires_grad_(False)
    ids = inputs["input_ids"]
    outs = []
    for cache in (PiKVCache(model, **SMALL), dynamic(model)):
        model(ids[:, :20], **with_cache(cache))
        outs.append(model(ids[:, 20:], **with_cache(cache)).logits)
    assert_close(*outs)
