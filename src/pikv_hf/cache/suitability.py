"""Checks that a cache fits a model, and warnings of methods that can do nothing for the model."""

import warnings
from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from ..attach.binding import Binding
from ..compressors import Identity
from ..layer.settings import Settings
from ..model.gates import all_gates
from ..model.modules import unpaged_reasons
from ..model.output_projection import output_projection
from .paged_cache import PagedCache
from .repetition.checks import check_repetition


def check_fit(cache: PagedCache, model: PreTrainedModel, binding: Binding) -> None:
    """Refuse a model that `cache` was not made for, or that lacks what its methods need."""
    settings = cache.settings
    if settings.needs_labels and not binding.gate_of:
        asking = ("router", "placement", "scheduler")
        needs = (settings.router and settings.router.needs_labels, settings.placement.needs_labels)
        name = next((k for k, v in zip(asking, needs, strict=False) if v), "scheduler")
        raise ValueError(
            f"`{name}` is {getattr(settings, name)}, which needs the gates of an MoE model; "
            f"{type(model).__name__} {_why_no_labels(model, binding)}."
        )
    if settings.has_early_gates:
        _ = binding.early_gate_of  # raises if a layer has none
    scheduler = settings.scheduler
    if scheduler is not None:
        scheduler.check(model, len(binding.attention))
        check_repetition(settings.needs.repetition, model, cache.native_class)
        constants = settings.needs.constants
        inputs = frozenset() if constants is None else constants.constant_inputs
        if "output" in settings.needs.inputs | inputs:
            for modules in binding.attention.values():
                output_projection(modules[0])
    if not hasattr(cache, "layers"):
        settings.compressor.check(model)
    else:
        paged, made_for = [state.layer_idx for state in cache.states], type(cache.config)
        if type(model.config) is not made_for or paged != sorted(binding.attention):
            raise ValueError(
                f"this PiKVCache was made for a model of {made_for.__name__} with paged layers "
                f"{paged}; it cannot be attached to {type(model).__name__}."
            )
    if settings.needs_rotary:
        _check_moves(settings, binding)


def _why_no_labels(model: PreTrainedModel, binding: Binding) -> str:
    if not binding.attention:
        return f"has nothing to label: {no_layer(unpaged_reasons(model.config, {}))}"
    decoder: Any = binding.decoder()
    if any(all_gates(decoder)):
        return "has none that runs after a paged attention layer"
    return "has none that is found"


def _check_moves(settings: Settings, binding: Binding) -> None:
    """Refuse to move keys that have no rotary embedding, or are encoded again at each move."""
    scheduler, compressor = settings.scheduler, settings.compressor
    if scheduler is None or "rerotate" not in settings.needs.inputs:
        return
    if compressor != Identity():
        raise ValueError(
            f"`compressor` is {compressor}, but `scheduler` is {scheduler}, which moves keys again "
            "and again: each time they would lose more. Use one without the other."
        )
    if all(rotary.is_identity for rotary in binding.rotaries.values()):
        raise ValueError(
            f"`scheduler` is {scheduler}, which moves keys by the rotary embedding of their "
            "layer, but no layer that is paged has one."
        )


def warn_if_idle(cache: PagedCache, stacklevel: int = 4) -> None:
    """Warn if no layer can be paged although the cache has methods that act on pages.

    `stacklevel`: by default the caller who made, or attached, the cache.
    """
    reasons, idle = cache.unpaged, cache.settings.methods
    if idle and len(reasons) == len(cache.layers_to_be):
        names = " and ".join(f"`{name}`" for name in idle)
        text = f"{names} can do nothing for {type(cache.model).__name__}: {no_layer(reasons)}."
        warnings.warn(f"{text} Everything is kept as it is.", UserWarning, stacklevel)


def no_layer(reasons: dict[int, str]) -> str:
    """Return a sentence that no layer can be paged, and why."""
    counts = Counter(reasons.values())
    parts = (f"{count} of {len(reasons)} layers: {why}" for why, count in counts.items())
    return f"no layer of it can be paged ({'; '.join(parts)})"


def unheard(cache: PagedCache, layer_idx: int, what: str) -> str:
    """Return a sentence that `what` ("attention", "experts") was not heard in a forward pass."""
    start = f"layer {layer_idx}: PiKVCache did not see the {what} of this forward pass: "
    binding = cache.binding
    if what == "attention" or binding is None:
        return f"{start}the attention module did not call the attention function of its config."
    return (
        f"{start}{type(binding.gate_of[layer_idx].module).__name__} was not called, as where a "
        "kernel (`use_kernels=True`) or a quantized block chooses the experts itself. Load the "
        "model without it, or use router=None and a scheduler that needs no experts."
    )


def unlabelled(cache: PagedCache, layer_idx: int, heard: int, tokens: int) -> str:
    """Return a sentence that a gate chose experts for only `heard` of `tokens` tokens."""
    assert cache.binding is not None, "a gate of the model was heard"
    return (
        f"layer {layer_idx}: {type(cache.binding.gate_of[layer_idx].module).__name__} was called "
        f"for {heard} of {tokens} tokens, as where images have experts of their own: use "
        "router=None and a scheduler that needs no experts."
    )


def warn_of_another_cache(cache: PagedCache) -> str:
    """Warn that `generate` goes on without its argument `cache`; return the warning."""
    text = (
        f"{type(cache.model).__name__} goes on with another cache after {cache.get_seq_length()} "
        "tokens: nothing of the PiKVCache that `generate` was given is read or written from there "
        "on. Models with two rotary scales ('longrope') do so where a text exceeds "
        "`original_max_position_embeddings`."
    )
    warnings.warn(text, UserWarning, stacklevel=4)
    return text
