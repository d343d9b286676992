"""Binding caches to a model: shadow configs, gate hooks, checks; and taking it all back."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache, PreTrainedConfig, PreTrainedModel

from .attached import AttachedCache
from .attention import NAME
from .changes import Changes, is_changed
from .checks import check_forward, check_generate, check_masks
from .context import CONTEXT
from .model.gates import Choice, block_of, gates_of_layers
from .model.modules import attention_modules
from .model.rotary import Rotary, check_axes, rotaries
from .model.versions import (
    PREFILL,
    forward_inputs,
    given_cache,
    unread_argument,
    warn_if_untested,
    with_attention_implementation,
)
from .passes import begin_forward, end_forward, prompt_length, reading_prompt
from .repetition import check_held

_BINDINGS: "weakref.WeakKeyDictionary[nn.Module, Binding]" = weakref.WeakKeyDictionary()
# Held from looking a binding up to counting a cache in, and while one is counted out.
LOCK = threading.RLock()


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper or a `torch.compile`d module."""
    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}; it must be a transformers PreTrainedModel, or one "
            "wrapped by PEFT or torch.compile."
        )
    return inner


def binding_of(model: PreTrainedModel) -> "Binding":
    """The binding of `model`, made if it has none; a cache that uses it calls `acquire`, under the
    same hold of `LOCK`."""
    return _BINDINGS.get(model) or Binding(model)


class Binding:
    """Everything that is changed on one model while caches are attached to it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)
        self.attention = attention_modules(model)
        paged = [module for modules in self.attention.values() for module in modules]
        decoder: Any = _innermost(model, paged) if paged else model.get_decoder()
        self.decoder = weakref.ref(decoder)
        self.gate_of = gates_of_layers(decoder, self.attention)
        self.users = 0
        self._has_gate_hooks = False
        # By the id of the changed module, which keeps them alive.
        self._changes: weakref.WeakValueDictionary[int, Changes] = weakref.WeakValueDictionary()

    @functools.cached_property
    def rotaries(self) -> dict[int, Rotary]:
        """How the keys of each paged layer turn with their position; raises ValueError."""
        return rotaries(self.decoder(), self.attention)

    def acquire(self, *, labels: bool) -> None:
        """Count a cache in; the first one attaches, the first that needs labels hooks the gates."""
        try:
            if self.users == 0:
                self._attach()
            if labels and not self._has_gate_hooks:
                self._hook_gates()
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
        self._has_gate_hooks = False
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
                self._of(module).put("config", _shadow(module))
        changes = self._of(decoder)
        changes.add(decoder.register_forward_pre_hook(self._before, with_kwargs=True))
        changes.add(decoder.register_forward_hook(self._after))
        changes.add(decoder.register_forward_hook(self._leave, always_call=True))
        if hasattr(model, "generate"):
            self._of(model).put("generate", CheckedGenerate(model))
            self._of(model).put(PREFILL, _prefill_of(model))

    def _of(self, module: nn.Module) -> Changes:
        """The changes of a module."""
        return self._changes.get(id(module)) or self._changes.setdefault(
            id(module), Changes(module)
        )

    def _hook_gates(self) -> None:
        decoder: Any = self.decoder()
        for idx, gate in self.gate_of.items():
            for source in (gate, block_of(gate, decoder)):
                hook = source.hook(functools.partial(_label, idx))
                self._of(source.module).add(hook)
        self._has_gate_hooks = True

    # A compiler passes these three hooks where no cache of ours is used.

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        CONTEXT.binding = self
        if CONTEXT.is_in_use or any(
            _ours(value) is not None for value in (*args, *kwargs.values())
        ):
            self._begin(module, args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if CONTEXT.cache is not None:
            _end()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward pass, a failed one too."""
        CONTEXT.cache = CONTEXT.ids = CONTEXT.binding = None

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module is not self.decoder():
            return  # a shallow copy, which shares its hooks
        CONTEXT.cache = CONTEXT.layer = None  # of a forward that failed half-way
        inputs = forward_inputs(module, args, kwargs)
        cache = _given(inputs)
        if cache is None:
            if CONTEXT.generating is not None and CONTEXT.generating.binding is self:
                CONTEXT.generating.skip_forward()
            return
        check_forward(cache, self.model(), inputs)
        check_masks(module.config)
        if cache.shared.needs_rotary:
            check_axes(inputs.get("position_ids"))
        check_held(cache, inputs, _length(inputs))
        begin_forward(cache, _length(inputs), inputs.get("attention_mask"))
        CONTEXT.cache, CONTEXT.ids = cache, inputs.get("input_ids")


@torch.compiler.disable
def _end() -> None:
    assert CONTEXT.cache is not None, "a forward pass with it has begun"
    end_forward(CONTEXT.cache, CONTEXT.ids)


def _length(inputs: dict[str, Any]) -> int:
    """How many tokens a forward pass is given."""
    embeds = inputs.get("inputs_embeds")
    ids = embeds if embeds is not None else inputs.get("input_ids")
    return 0 if ids is None else ids.shape[1]


def _label(idx: int, choose: Callable[[], Choice]) -> None:
    """A gate, or its block, has spoken: hand its choice to the layer, if it still waits for one."""
    cache = CONTEXT.cache
    if cache is not None and cache.awaits_experts(idx):
        cache.label(idx, *choose())


class CheckedGenerate:
    """`model.generate`, which first refuses what would silently ignore or misread the cache.

    A `generate` that somebody put on this very model is called then, not the one of its class.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        self.own = vars(model).get("generate")
        self.__wrapped__ = self.own or type(model).generate
        self.__doc__ = self.__wrapped__.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model()
        cache = _given(kwargs)
        if cache is not None:
            check_generate(cache, model, args, kwargs)
        outer, CONTEXT.generating = CONTEXT.generating, cache
        try:
            if self.own is not None:
                return self.own(*args, **kwargs)
            if cache is None:
                return type(model).generate(model, *args, **kwargs)
            with reading_prompt(cache, prompt_length(cache, model, args, kwargs)):
                return type(model).generate(model, *args, **kwargs)
        finally:
            CONTEXT.generating = outer


def _prefill_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The step of `generate` that reads the prompt, for `model`; it says how long the prompt is.

    `model.generate(cache=PiKVCache(model))` looks `generate` up before the cache attaches.
    """
    found, own = weakref.ref(model), vars(model).get(PREFILL)

    def prefill(input_ids: Any, config: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        model: Any = found()
        call = own or functools.partial(getattr(type(model), PREFILL), model)
        cache = _given(inputs)
        if cache is None:
            return call(input_ids, config, inputs, *args, **kw)
        with reading_prompt(cache, prompt_length(cache, model, (input_ids,), inputs)):
            return call(input_ids, config, inputs, *args, **kw)

    return prefill


def _given(inputs: dict[str, Any]) -> AttachedCache | None:
    """The cache of ours among the arguments `inputs` of a model or of `generate`.

    Raises:
        ValueError: it is in an argument that the model does not read.
    """
    cache = given_cache(inputs)
    for name, value in inputs.items():
        if value is not cache and _ours(value) is not None:
            raise ValueError(unread_argument(name))
    return _ours(cache)


def _ours(cache: Any) -> AttachedCache | None:
    """`cache`, or the part of it that a decoder writes to, if it is one that attaches."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, AttachedCache) else None


def _shadow(module: Any) -> PreTrainedConfig:
    """A config for one attention module that names our function."""
    original = module.config
    check_masks(original)
    shadow: Any = with_attention_implementation(original, NAME)
    shadow._pikv_original = original
    return shadow


def _innermost(model: PreTrainedModel, parts: list[nn.Module]) -> PreTrainedModel:
    """The smallest PreTrainedModel inside `model` that contains all `parts`."""
    best, needed = model, {id(part) for part in parts}
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel):
            inside = {id(module) for module in candidate.modules()}
            if needed <= inside and candidate in set(best.modules()):
                best = candidate
    return best
