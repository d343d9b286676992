"""Quantized models: what is read of a weight is what its module applies, and gates are heard."""

import pytest
import torch
from helpers import ONE_ROW, PADDED, SMALL, assert_same, dynamic, generate, paged, tail_labels
from quantized import (
    LINEARS,
    FP8Experts,
    FusedExperts,
    Mxfp4GptOssMLP,
    projections,
    quantize,
    replace_parts,
    round_weights,
)
from tolerances import EIGHT_BITS
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.model.artifact import ModelIdentity
from pikv_hf.model.output_projection import matrix
from pikv_hf.model.versions import declared_gates

FEW = {"max_new_tokens": 5}  # a page more
kinds = pytest.mark.parametrize("kind", LINEARS)


@kinds
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_lossless(kind, name) -> None:
    model = quantize(build(name), kind)
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model), **FEW)
    assert_same(generate(model, inputs, PiKVCache(model, router="all", **SMALL), **FEW), expected)


@kinds
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_schedulers_see_what_the_module_applies(kind, name) -> None:
    """`criticalkv` keeps what it keeps of the plain model with the same weights."""
    plain, model = (build(name) for _ in range(2))
    for _, part, linear in projections(plain) + projections(model):
        if part == "o_proj" and linear.bias is not None:
            linear.bias.data.fill_(0.5)  # which is no part of the matrix
    plain, model = round_weights(plain), quantize(model, kind)
    inputs = prompt(plain, ONE_ROW)
    methods = {"scheduler": "criticalkv", "budget": 16, **SMALL}
    ours, theirs = (PiKVCache(m, **methods) for m in (model, plain))
    assert_same(generate(model, inputs, ours, **FEW), generate(plain, inputs, theirs, **FEW))
    for mine, other in zip(paged(ours), paged(theirs), strict=False):
        assert mine.state.held_tokens() == other.state.held_tokens() < 40


@kinds
def test_a_fingerprint_reads_plain_weights_only(kind) -> None:
    identity = ModelIdentity.of(quantize(build("deepseek_v3"), kind))
    names = identity.fingerprint.keys()
    assert names and not any(name.endswith("proj.weight") for name in names)


@pytest.mark.parametrize("part", ["experts", "block", "router"])
def test_labels(part) -> None:
    """Experts of another class, a block that computes everything itself, experts with a kernel's
    arguments: the labels of the plain model, and its tokens."""
    plain, model = build("gpt_oss"), build("gpt_oss")
    name = "mlp" if part == "block" else "experts"
    make = {"experts": FP8Experts, "block": Mxfp4GptOssMLP, "router": FusedExperts}[part]
    replace_parts(model, name, make)
    inputs = prompt(plain, PADDED)
    theirs, ours = (PiKVCache(m, router="all", page_size=4, window=64) for m in (plain, model))
    assert_same(generate(model, inputs, ours, **FEW), generate(plain, inputs, theirs, **FEW))
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        if hasattr(mine, "tail"):
            labels, wanted = tail_labels(mine), tail_labels(other)
            assert torch.equal(labels["experts"], wanted["experts"])
            torch.testing.assert_close(labels["weights"], wanted["weights"])


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_the_choice_of_a_router_is_not_that_of_its_logits(name) -> None:
    """Groups and biases decide, too: what the router returns as its choice counts."""
    plain, model = (build(name, n_group=2, topk_group=1) for _ in range(2))
    for owner in (*plain.modules(), *model.modules()):
        if hasattr(owner, "e_score_correction_bias"):
            owner.e_score_correction_bias.data = torch.linspace(-1, 1, 8)
    replace_parts(model, "experts", FusedExperts)
    if not declared_gates(type(model)):  # some models have none before 5.23
        with pytest.raises(ValueError, match="has none that is found"):
            PiKVCache(model, router="all")
        return
    inputs = prompt(plain, ONE_ROW)
    theirs, ours = (PiKVCache(m, router="all", page_size=4, window=64) for m in (plain, model))
    generate(plain, inputs, theirs, **FEW), generate(model, inputs, ours, **FEW)
    labels = [
        [tail_labels(layer) for layer in paged(cache) if layer.state.facts.has_gate]
        for cache in (ours, theirs)
    ]
    assert labels[0]
    for mine, other in zip(*labels, strict=True):
        assert torch.equal(mine["experts"], other["experts"])
        assert torch.equal(mine["weights"], other["weights"])


@kinds
@pytest.mark.parametrize("bias", [False, True])
def test_the_matrix_is_that_of_the_weight(kind, bias) -> None:
    linear = torch.nn.Linear(24, 10, bias=bias)
    expected = linear.weight.data.clone()
    found = matrix(LINEARS[kind](linear), 24, torch.zeros(1))
    torch.testing.assert_close(found, expected, atol=EIGHT_BITS, rtol=0)
