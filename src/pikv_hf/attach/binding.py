"""Binding of caches to a model: shadow configs, gate hooks and checks, and their removal."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.function import NAME
from ..layer.handoff import hand_over
from ..model.early_gates import EarlyGate, early_gates
from ..model.gates import Choice, block_of, gates_of_layers
from ..model.masks import check_masks
from ..model.modules import attention_modules
from ..model.rotary import Rotary, rotaries
from ..model.versions import (
    PREFILL,
    forward_inputs,
    warn_if_untested,
    with_attention_implementation,
)
from .changes import Changes, is_changed
from .forward import RUNNING
from .generate import CheckedGenerate, as_attachable, attachable_cache, checked_prefill

_BINDINGS: "weakref.WeakKeyDictionary[nn.Module, Binding]" = weakref.WeakKeyDictionary()
# Held from the look-up of a binding until a cache has acquired it, and during a release.
LOCK = threading.RLock()


def binding_of(model: PreTrainedModel) -> "Binding":
    """Return or make the binding of `model`; the caller holds `LOCK` until a cache acquires it."""
    return _BINDINGS.get(model) or Binding(model)


class Binding:
    """The changes made to one model while caches are attached to it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        self.attention = attention_modules(model)
        paged = [module for modules in self.attention.values() for module in modules]
        decoder: Any = _innermost(model, paged) if paged else model.get_decoder()
        self.decoder = weakref.ref(decoder)
        self.gate_of = gates_of_layers(decoder, self.attention)
        self.users = 0
        self._has_gate_hooks = self._has_early_hooks = False
        # By the id of the changed module, which keeps its `Changes` alive.
        self._changes: weakref.WeakValueDictionary[int, Changes] = weakref.WeakValueDictionary()

    @functools.cached_property
    def rotaries(self) -> dict[int, Rotary]:
        """Rotation of the keys of each paged layer; reading it may raise ValueError."""
        return rotaries(self.decoder(), self.attention)

    @functools.cached_property
    def early_gate_of(self) -> dict[int, EarlyGate]:
        """Gate of each layer for the input of the layer; reading it may raise ValueError."""
        decoder: Any = self.decoder()
        return early_gates(decoder, self.attention, self.gate_of)

    def acquire(self, *, labels: bool, early_gates: bool) -> None:
        """Count a cache in; the first one changes the model.

        The first with `labels` hooks its gates, the first with `early_gates` its decoder layers.
        """
        try:
            if self.users == 0:
                self._attach()
            if labels and not self._has_gate_hooks:
                self._hook_gates()
            if early_gates and not self._has_early_hooks:
                self._hook_early_gates()
        except BaseException:
            if self.users == 0:
                self._restore()
            raise
        self.users += 1

    def release(self) -> None:
        with LOCK:
            self.users -= 1
            if self.users == 0:
                self._restore()

    def _restore(self) -> None:
        for changes in list(self._changes.values()):
            changes.undo()
        self._changes.clear()
        self._has_gate_hooks = self._has_early_hooks = False
        model = self.model()
        if model is not None:
            _BINDINGS.pop(model, None)

    def _attach(self) -> None:
        warn_if_untested()
        model, decoder = self.model(), self.decoder()
        assert model is not None and decoder is not None, "a cache is being attached to them"
        if is_changed(decoder):
            raise ValueError(
                f"`model` is a {type(model).__name__} around a {type(decoder).__name__} that has "
                "caches of another model: call `cache.detach()` on them first."
            )
        _BINDINGS[model] = self
        for modules in self.attention.values():
            for module in modules:
                self._changes_of(module).put("config", _shadow(module))
        changes = self._changes_of(decoder)
        changes.add(decoder.register_forward_pre_hook(self._before, with_kwargs=True))
        changes.add(decoder.register_forward_hook(self._after))
        changes.add(decoder.register_forward_hook(self._leave, always_call=True))
        if hasattr(model, "generate"):
            self._changes_of(model).put("generate", CheckedGenerate(model))
            self._changes_of(model).put(PREFILL, checked_prefill(model))

    def _changes_of(self, module: nn.Module) -> Changes:
        return self._changes.get(id(module)) or self._changes.setdefault(
            id(module), Changes(module)
        )

    def _hook_gates(self) -> None:
        decoder: Any = self.decoder()
        for idx, gate in self.gate_of.items():
            for source in (gate, block_of(gate, decoder)):
                hook = source.hook(functools.partial(_label, idx))
                self._changes_of(source.module).add(hook)
        self._has_gate_hooks = True

    def _hook_early_gates(self) -> None:
        for idx, gate in self.early_gate_of.items():
            hook = gate.hook(functools.partial(_foretell, idx))
            self._changes_of(gate.layer).add(hook)
        self._has_early_hooks = True

    # torch.compile traces the next three hooks, unless a PiKVCache is used.

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        RUNNING.binding = self
        if RUNNING.is_in_use or any(
            as_attachable(value) is not None for value in (*args, *kwargs.values())
        ):
            self._begin(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if RUNNING.cache is not None:
            _end()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Clear `RUNNING` after a forward pass, also after a failed one."""
        if RUNNING.cache is not None:
            _left()
        RUNNING.cache = RUNNING.ids = RUNNING.binding = None

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module is not self.decoder():
            return  # `module` is a shallow copy of the decoder, which shares its hooks
        RUNNING.cache = None  # left by a forward pass that failed
        hand_over(None)
        inputs = forward_inputs(module, args, kwargs)
        cache = attachable_cache(inputs)
        if cache is None:
            given = RUNNING.generating
            if given is not None and given.binding is self:
                given.skip_forward()
            return
        cache.check_inputs(self.model(), module.config, inputs)
        cache.begin_forward(inputs)
        RUNNING.cache, RUNNING.ids = cache, inputs.get("input_ids")


@torch.compiler.disable
def _end() -> None:
    assert RUNNING.cache is not None, "a forward pass with it has begun"
    RUNNING.cache.end_forward(RUNNING.ids)


@torch.compiler.disable
def _left() -> None:
    assert RUNNING.cache is not None, "a forward pass with it has begun"
    RUNNING.cache.leave_forward()


def _label(idx: int, choose: Callable[[], Choice]) -> None:
    """Hand the choice of a gate, or of its block, to the layer, if the layer still awaits one."""
    cache = RUNNING.cache
    if cache is not None and cache.awaits_experts(idx):
        cache.label(idx, *choose())


def _foretell(idx: int, length: int, choose: Callable[[], Choice]) -> None:
    """Hand the choice of an early gate for `length` tokens to the layer, if it selects pages by it."""
    cache = RUNNING.cache
    if cache is not None and cache.selects_by_early_gate(idx, length):
        cache.foretell(idx, *choose())


def _shadow(module: Any) -> PreTrainedConfig:
    """Return a config for one attention module that names `pikv_attention`."""
    original = module.config
    check_masks(original)
    shadow: Any = with_attention_implementation(original, NAME)
    shadow._pikv_original = original
    return shadow


def _innermost(model: PreTrainedModel, parts: list[nn.Module]) -> PreTrainedModel:
    """Return the smallest PreTrainedModel inside `model` that contains all `parts`."""
    best, needed = model, {id(part) for part in parts}
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel):
            inside = {id(module) for module in candidate.modules()}
            if needed <= inside and candidate in set(best.modules()):
                best = candidate
    return best
