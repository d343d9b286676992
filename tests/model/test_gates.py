"""Labels are the experts that the model chose, on every MoE architecture of transformers."""

from typing import Any

import pytest
import torch
from helpers import SMALL, tail_labels
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from zoo import build, discover, prompt

from pikv_hf import PiKVCache
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.model.versions import with_cache

LENGTHS = (9, 7)
EXPERTS = 8  # of the tiny models
OPEN = {**SMALL, "window": 16}  # all tokens stay in the tail, with their labels


def record(cache: PiKVCache, tokens: int) -> list[tuple[str, Any]]:
    """What happens in forward passes, in order: layers that are cached and experts chosen.

    A choice is what a module is called with, or returns: ids, or masks or weights of all experts.
    """
    events: list[tuple[str, Any]] = []
    update = cache.update

    def updated(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        events.append(("layer", layer_idx))
        return update(keys, values, layer_idx, *args, **kwargs)

    def seen(*parts: Any) -> None:
        for part in parts:
            if isinstance(part, Tensor) and part.dim() == 2 and len(part) == tokens:
                used = int((part != 0).sum(-1).max())
                if part.dtype == torch.int64 and part.shape[1] <= 4:
                    events.append(("choice", part.sort(-1).values))
                elif part.shape[1] == EXPERTS and used <= 4:
                    events.append(("choice", part.topk(used).indices.sort(-1).values))

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen(*args, *kwargs.values())

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            seen(*output)

    cache.update = updated
    for module in cache.binding.decoder().modules():
        module.register_forward_pre_hook(called, with_kwargs=True)
        module.register_forward_hook(returned)
    return events


def chosen(events: list[tuple[str, Any]], paged: set[int]) -> dict[int, Tensor]:
    """For each paged layer the first choice behind it, before the next paged layer."""
    found: dict[int, Tensor] = {}
    last = None
    for kind, value in events:
        if kind == "layer" and value in paged:
            last = value
        elif kind == "choice" and last is not None:
            found.setdefault(last, value)
    return found


# The usual order of layers has no gate behind the only attention layer.
FIELDS = {"nemotron_h": {"layer_types": ["linear_attention", "full_attention", "moe", "mlp"]}}
SLOW = ["longcat_flash", "dots3_note"]  # to build
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in discover().found
    if name != "doge"  # which fails without us before 5.20, and of which no layer is ever paged
]


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_the_recorded_choice(name) -> None:
    model = build(name, **FIELDS.get(name, {}))
    try:
        cache = PiKVCache(model, router="all", **OPEN)
    except ValueError as error:
        # Before 5.23 the experts of aria choose for themselves.
        nothing = "nothing to label: no layer of it can be paged"
        assert nothing in str(error) or (name == "aria" and "has none that is found" in str(error))
        return
    inputs = prompt(model, LENGTHS)
    events = record(cache, len(LENGTHS) * max(LENGTHS))
    both = EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache
    model.generate(**inputs, **with_cache(both), max_new_tokens=1)
    paged = {i for i, layer in enumerate(cache.layers) if isinstance(layer, PagedLayer)}
    expected = chosen(events, paged)
    for idx in paged - cache.unpaged.keys():
        layer = cache.layers[idx]
        assert layer.state.facts.has_gate == (idx in expected)
        if layer.state.facts.has_gate:
            labels = tail_labels(layer)["experts"].long().flatten(0, 2).sort(-1).values
            assert torch.equal(labels, expected[idx]), f"layer {idx}"


def test_a_router_inside_attention_is_no_gate() -> None:
    """JetMoE chooses projections of attention, too: those are not the experts of a token."""
    model = build("jetmoe")
    cache = PiKVCache(model, router="all", **OPEN)
    heard, expected = [], []
    for idx, layer in enumerate(model.model.layers):
        gate = cache.binding.gate_of[idx]
        assert gate.module is layer.mlp.router
        gate.hook(lambda choose: heard.append(choose()[0]))
        layer.mlp.router.register_forward_hook(
            lambda module, args, output: expected.append(output[4].topk(2).indices)
        )
    with torch.no_grad(), pytest.warns(UserWarning, match="`router` can do nothing"):
        model(prompt(model, LENGTHS)["input_ids"], **with_cache(cache))
    assert len(heard) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(heard, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("nemotron_h", {}, "has none that runs after a paged attention layer"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "has none that is found"),
    ],
)
def test_why_there_is_no_gate(name, fields, why) -> None:
    with pytest.raises(ValueError, match=f"`router` is All.*{why}"):
        PiKVCache(build(name, **fields), router="all")


def test_experts_that_get_some_tokens_only() -> None:
    """With images, ERNIE's text experts get the text alone: its labels would be of other tokens."""
    model = build("ernie4_5_vl_moe")
    cache = PiKVCache(model, router="all", **OPEN)
    ids = prompt(model, (12,))["input_ids"]
    is_image = torch.arange(12)[None] < 5
    match = "Experts was called for 7 of 12 tokens.*router=None"
    with pytest.raises(RuntimeError, match=match), torch.no_grad():
        model.model.language_model(ids, moe_mm_token_type_ids=is_image.int(), **with_cache(cache))
