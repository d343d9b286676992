"""The gate applied before attention: what it foretells, of which tokens, and which models have it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers import PADDED, SMALL, assert_same, generate, paged, spans_of, tail_labels, tiny
from quantized import FusedExperts, Mxfp4GptOssMLP, replace_parts
from test_generate_modes import disturbed
from test_router_rows import drafts
from torch import Tensor
from zoo import build, discover, prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.attachment import AttachedCache
from pikv_hf.model.gates import Choice
from pikv_hf.model.versions import with_cache
from pikv_hf.routers import TopK

EARLY = {"experts_from": "early_gate"}
NAMES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]
PARTS = {"gpt_oss": "router"}  # the attribute of a block with its gate, "gate" elsewhere


@dataclass(frozen=True)
class Noting(TopK):
    """Notes the experts and weights [B, q, k] that it was given for queries, by layer, in order."""

    asked: list = field(default_factory=list, hash=False, compare=False)

    def scores(self, query, pages):
        self.asked.append((query.layer_idx, query.experts, query.weights))
        return super().scores(query, pages)


def inputs_of_layers(model: Any) -> dict[int, Tensor]:
    """The newest input [B, q, hidden] of each decoder layer of a model, by a hook of its own."""
    found: dict[int, Tensor] = {}
    for idx, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, idx=idx: found.update({idx: args[0]}))
    return found


def by_hand(model: Any, idx: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """The experts and weights [B, q, k] of the layer's own gate for `states` [B, q, hidden]."""
    layer = model.model.layers[idx]
    gate = getattr(layer.mlp, PARTS.get(model.config.model_type, "gate"))
    with torch.no_grad():
        _, weights, experts = gate(layer.post_attention_layernorm(states).flatten(0, 1))
    return experts.unflatten(0, states.shape[:2]), weights.unflatten(0, states.shape[:2])


def assert_foretold(name: str, read: Callable[[Any, PiKVCache], None], **options: Any) -> Noting:
    """While `read` runs, each foretold label is that of the gate, called by hand on the input."""
    model = build(name)
    router, inputs = Noting(top_pages=2, **EARLY), inputs_of_layers(model)
    scores = Noting.scores

    def checked(self: Noting, query: Any, pages: Any) -> Tensor:
        if query.experts is not None:  # a layer without a gate
            experts, weights = by_hand(model, query.layer_idx, inputs[query.layer_idx])
            assert torch.equal(query.experts, experts) and torch.equal(query.weights, weights)
        return scores(self, query, pages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noting, "scores", checked)
        with PiKVCache(model, router=router, **{**SMALL, **options}) as cache:
            read(model, cache)
            gated = {layer.state.layer_idx for layer in paged(cache) if layer.state.facts.has_gate}
            assert gated == {idx for idx, experts, _ in router.asked if experts is not None}
    return router


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_labels_are_those_of_the_gate_called_by_hand(name, options) -> None:
    """In padded rows, also of beams, and after a prompt in chunks, which foretells nothing."""
    router = assert_foretold(
        name, lambda model, cache: generate(model, prompt(model, PADDED), cache, **options)
    )
    assert {experts.shape[1] for _, experts, _ in router.asked if experts is not None} == {1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
def test_drafted_tokens(name, mode) -> None:
    if mode == "assistant":
        drafter: dict[str, Any] = {"assistant_model": disturbed(name)}
    else:
        drafter = {"prompt_lookup_num_tokens": 3}

    def read(model: Any, cache: PiKVCache) -> None:
        generate(model, drafts(model, 2), cache, **drafter)

    router = assert_foretold(name, read)
    assert max(experts.shape[1] for _, experts, _ in router.asked if experts is not None) > 1


@pytest.mark.parametrize("name", NAMES)
def test_pages_have_the_labels_of_their_own_layer(name) -> None:
    model, chosen = build(name), {}
    cache = PiKVCache(model, router=TopK(top_pages=1, **EARLY), **SMALL)
    for idx, gate in cache.binding.gate_of.items():
        gate.hook(lambda choice, idx=idx: chosen.setdefault(idx, []).append(choice()[0]))
    generate(model, prompt(model, (29,)), cache)
    for layer in paged(cache):
        if layer.state.facts.has_gate:
            parts = [*spans_of(layer, [0]), tail_labels(layer)]
            held = torch.cat([tokens["experts"][0, 0] for tokens in parts])
            assert torch.equal(held.long(), torch.cat(chosen[layer.state.layer_idx]))


def test_nothing_of_the_model_sees_it() -> None:
    """Hooks of norms and gates, and the recorded router logits, are those of a cache without it."""
    model, calls = build("mixtral"), itertools.count()
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: next(calls) and None)
    found = []
    for source in ("early_gate", "previous_token"):
        start = next(calls)
        with PiKVCache(model, router=TopK(experts_from=source), **SMALL) as cache:
            generate(model, prompt(model, (29,)), cache)
            ids = torch.full((1, 1), 5)
            with torch.no_grad():
                out = model(ids, output_router_logits=True, **with_cache(cache))
        found.append((next(calls) - start, len(out.router_logits)))
    assert found[0] == found[1]
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_weights_that_accelerate_brings() -> None:
    expected = generate(
        tiny("mixtral"),
        prompt(tiny("mixtral"), PADDED),
        PiKVCache(tiny("mixtral"), router=TopK(top_pages=2, **EARLY), **SMALL),
    )
    model = build("mixtral")
    inputs = prompt(model, PADDED)
    cpu_offload(model, "cpu")
    cache = PiKVCache(model, router=TopK(top_pages=2, **EARLY), **SMALL)
    actual = generate(model, inputs, cache)
    assert_same(actual, expected)


@pytest.mark.parametrize("part", ["block", "router"])
def test_blocks_that_call_no_gate(part) -> None:
    """Their gate is there still; what a block chooses itself is what the gate would choose."""
    model = build("gpt_oss")
    make = {"block": Mxfp4GptOssMLP, "router": FusedExperts}[part]
    replace_parts(model, "mlp" if part == "block" else "experts", make)
    router = Noting(top_pages=2, **EARLY)
    generate(model, prompt(model, PADDED), PiKVCache(model, router=router, **SMALL))
    plain = Noting(top_pages=2, **EARLY)
    generate(
        tiny("gpt_oss"), prompt(model, PADDED), PiKVCache(tiny("gpt_oss"), router=plain, **SMALL)
    )
    for (_, ours, _), (_, theirs, _) in zip(router.asked, plain.asked, strict=True):
        assert torch.equal(ours, theirs)


# ---- which models have it -----------------------------------------------------------------------

NO_NORM, NO_GATE, NO_CHOICE = "no known norm before its gate", "no gate module", "alone does not"
REFUSED = {
    "afmoe": NO_CHOICE,  # its gate takes states [B, q, hidden]
    "cohere2_moe": NO_NORM,
    "dbrx": NO_NORM,
    "ernie4_5_vl_moe": NO_GATE,
    "flex_olmo": NO_NORM,
    "gemma4": NO_NORM,
    "nllb_moe": NO_NORM,
    "switch_transformers": NO_NORM,
}
# Without a paged layer that has a gate, of classes that generate by themselves, or slow to build.
OTHERS = {"doge", "qwen3_omni_moe_talker", "longcat_flash", "dots3_note"}


# In every run; the rest in `make test-all`.
FEW = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "dbrx", "afmoe", "gemma4"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow])
        for name in sorted(discover().found.keys() - OTHERS)
    ],
)
def test_every_architecture(name) -> None:
    """Applied to what the norm reads in the model's own pass, it gives the choice of the layer."""
    model = build(name)
    try:
        cache = PiKVCache(model, router=TopK(**EARLY), **SMALL)
    except ValueError as error:
        text = str(error)
        if name in REFUSED:
            assert REFUSED[name] in text and text.startswith("`experts_from` is 'early_gate'")
        else:
            assert "needs the gates of an MoE model" in text
        return
    assert name not in REFUSED
    read: dict[int, Tensor] = {}
    chosen: dict[int, Choice] = {}
    for idx, early in cache.binding.early_gate_of.items():
        gate = cache.binding.gate_of[idx]
        early.norm.register_forward_pre_hook(lambda _, args, idx=idx: read.update({idx: args[0]}))
        gate.hook(lambda choose, idx=idx: chosen.update({idx: choose()}))
    with torch.no_grad():
        generate(model, prompt(model, (19,)), cache, max_new_tokens=1)
    for idx, early in cache.binding.early_gate_of.items():
        found = early.choice(read[idx].view(1, 19, -1))
        for ours, theirs in zip(found, chosen[idx], strict=True):
            assert torch.equal(ours.view(theirs.shape), theirs)


def test_a_gate_that_gives_logits_alone() -> None:
    """As in models where the block around the gate chooses: refused when the cache is made."""
    model = build("mixtral")
    gate: Any = model.model.layers[1].mlp.gate
    gate.forward = lambda states: states @ gate.weight.mT
    with pytest.raises(ValueError, match=f"layer 1 of Mixtral.*TopKRouter, that {NO_CHOICE}"):
        PiKVCache(model, router=TopK(**EARLY))
    PiKVCache(model, router=TopK()).detach()


def test_a_layer_that_was_not_called(monkeypatch) -> None:
    """What should be heard, and was not, is an error."""
    monkeypatch.setattr(AttachedCache, "selects_by_early_gate", lambda *_: False)
    model = tiny("mixtral")
    cache = PiKVCache(model, router=TopK(top_pages=1, **EARLY), **SMALL)
    with pytest.raises(RuntimeError, match="layer 0: its decoder layer was not called"):
        generate(model, prompt(model, (29,)), cache)
