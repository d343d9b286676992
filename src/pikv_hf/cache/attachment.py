"""A cache that is bound to the model that uses it."""

import copy
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from typing_extensions import Self

from ..attach.binding import LOCK, Binding, binding_of
from ..attach.forward import RUNNING
from ..attention.routed import selecting_router
from ..layer.paged_layer import PagedLayer
from ..layer.state import LayerFacts
from ..model.gates import num_experts
from ..model.head_dims import head_dims
from ..model.masks import check_masks
from ..model.modules import unpaged_reasons
from ..model.own_cache import model_cache_class, with_native
from ..model.parallel import parallelism
from ..model.rotary import check_axes
from ..model.versions import is_tested, unsupported
from ..model.wrappers import unwrap
from ..routers import PageRouter
from ..storage.token_table import TokenTable
from .checks import check_forward, check_generate, num_new_tokens
from .division import check_division
from .other_layers import release_prompt
from .paged_cache import PagedCache
from .passes import begin_forward, compress, end_forward, prompt_length
from .repetition.checks import check_held
from .site import site_of
from .suitability import check_fit, unlabelled, warn_if_idle, warn_of_another_cache


def _checked(name: str) -> Callable[..., Any]:
    """Wrap the method `name` of transformers' Cache to refuse models that are not attached."""

    def method(self: "AttachedCache", *args: Any, **kwargs: Any) -> Any:
        self._check_use()
        self.step.note_written()
        return getattr(super(AttachedCache, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


class AttachedCache(PagedCache):
    """A cache that attaches to its model, is written to by it, and can be copied.

    A subclass calls `make_parts` and then `attach`, or `fill` for a cache without a model.
    """

    binding: Binding | None = None
    _finalizer: Any = None
    _num_skipped, _has_warned = 0, False
    plain_class: "type[AttachedCache] | None" = None

    def __new__(cls, model: Any = None, **kwargs: Any) -> Self:
        native = None if model is None else model_cache_class(unwrap(model))
        new: Any = object.__new__(with_native(cls, native))
        return new

    # ---- attaching ------------------------------------------------------------------------------

    def attach(self, model: Any) -> Self:
        """Attach a detached, loaded or new cache to `model`. Returns self.

        A cache that holds tokens must be attached to the model that made them, or to its copy.
        """
        if self.binding is not None:
            raise RuntimeError("this PiKVCache is attached already: call `cache.detach()` first.")
        division, model = parallelism(model), unwrap(model)
        with LOCK:
            binding = binding_of(model)
            check_division(self.settings, division, binding.attention)
            check_fit(self, model, binding)
            if not hasattr(self, "layers"):
                self.site = site_of(self.settings.placement, model, binding, division)
                self.fill(model.config, binding, division.layers)
            rotaries = binding.rotaries if self.settings.needs_rotary else {}
            binding.acquire(
                labels=self.settings.needs_labels, early_gates=self.settings.has_early_gates
            )
        self.binding = binding
        for state in self.states:
            state.bind(binding.attention[state.layer_idx][0], rotaries.get(state.layer_idx))
        self._finalizer = weakref.finalize(self, binding.release)
        warn_if_idle(self)
        return self

    def detach(self) -> None:
        """Detach from the model, which is restored once its last cache is detached."""
        if self._finalizer is not None:
            self._finalizer()
        self.binding, self._finalizer = None, None
        for state in self.states:
            state.bind(None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def fill(self, config: Any, binding: Binding | None = None, stage: range | None = None) -> None:
        """Make the layers: paged if `binding` has their attention, else transformers' own.

        This rank runs the layers in `stage`; None = all.
        """
        self.config, self.stage = config, stage
        layers: list[Any] = DynamicCache(config=config).layers
        attention = {} if binding is None else binding.attention
        self.unpaged_from_start = {} if binding is None else unpaged_reasons(config, attention)
        self.unpaged_from_start |= {
            idx: "a layer of another rank" for idx in range(len(layers)) if not self.runs(idx)
        }
        for number, (idx, modules) in enumerate(sorted(attention.items())):
            assert binding is not None, "it knows the attention modules"
            has_gate = idx in binding.gate_of
            settings = self.settings
            counts_experts = has_gate and (
                isinstance(settings.router, PageRouter) or settings.placement.needs_labels
            )
            is_latent = hasattr(modules[0], "kv_b_proj")
            facts = LayerFacts(
                layer_idx=idx,
                paged_index=number,
                num_paged=len(attention),
                has_gate=has_gate,
                num_experts=num_experts(config) if counts_experts else None,
                latent_rank=getattr(modules[0], "kv_lora_rank", None) if is_latent else None,
            )
            layers[idx] = layer = self.paged_layer(facts)
            if (dims := head_dims(modules[0])) is not None:
                layer.state.compressor.check_dims(*dims)
        self.start(layers)

    # ---- being written to -----------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new states of one layer; return the keys and values for its attention.

        A model that knows the experts of its tokens before its gates run may pass `expert_ids`, and
        `expert_weights`, [B, T, k] each: see `PagedLayer.update`.
        """
        self._check_use()
        layer = self.layer_at(layer_idx)
        if isinstance(layer, PagedLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        self.step.note_written()
        states = layer.update(key_states, value_states, *args, **kwargs)
        release_prompt(layer)
        return states

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Return whether a layer holds a state, to which models before 5.23 then write in place."""
        if layer_idx is not None:
            self._check_use()
            self.step.note_written()
        return super().has_previous_state(layer_idx, *args, **kwargs)

    get_conv_state = _checked("get_conv_state")  # a model may write to its result
    get_recurrent_state = _checked("get_recurrent_state")
    update_conv_state = _checked("update_conv_state")
    update_recurrent_state = _checked("update_recurrent_state")
    update_indexer = _checked("update_indexer")

    def _check_use(self) -> None:
        """Refuse, before anything is written, a model that the cache is not attached to."""
        if not self.elsewhere.paged:
            return
        if self.binding is None:
            raise RuntimeError(
                "this PiKVCache is not attached to a model: call `cache.attach(model)` first."
            )
        if RUNNING.cache is not self:
            if not is_tested() or RUNNING.binding is self.binding:
                raise RuntimeError(
                    f"{unsupported()}: no argument of the model's forward pass is this PiKVCache."
                )
            raise ValueError(
                "this PiKVCache was given to a model that it is not attached to: make one for "
                "this model with `PiKVCache(model)`."
            )

    # ---- calls from the binding -----------------------------------------------------------------

    def check_generate(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_generate(self, model, args, kwargs)

    def generating(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        return self.reading.prompt(prompt_length(self, model, args, kwargs))

    def check_inputs(self, model: Any, config: PreTrainedConfig, inputs: dict[str, Any]) -> None:
        check_forward(self, model, inputs)
        check_masks(config)
        if self.settings.needs_rotary:
            check_axes(inputs.get("position_ids"))
        check_held(self, inputs, num_new_tokens(inputs))

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        self._num_skipped, self.note = 0, None
        begin_forward(self, num_new_tokens(inputs), inputs.get("attention_mask"))

    def awaits_experts(self, layer_idx: int) -> bool:
        layer = self.layers[layer_idx]
        return isinstance(layer, PagedLayer) and layer.state.awaits == "experts"

    def label(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        layer = self.layers[layer_idx]
        tail = layer.state.tail
        shape = (tail.batch, tail.unlabelled, experts.shape[-1])
        if len(experts) != shape[0] * shape[1]:
            raise RuntimeError(unlabelled(self, layer_idx, len(experts), shape[0] * shape[1]))
        layer.label(experts.view(shape), weights.detach().view(shape))

    def selects_by_early_gate(self, layer_idx: int, length: int) -> bool:
        layer = self.layers_to_be[layer_idx]
        if not self.settings.has_early_gates or not isinstance(layer, PagedLayer):
            return False
        return selecting_router(layer.state, length, layer.state.num_seen) is not None

    def foretell(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        state = self.layers[layer_idx].state
        shape = (state.tail.batch, 1, -1, experts.shape[-1])
        labels = TokenTable({"experts": experts.view(shape), "weights": weights.view(shape)})
        state.step.foretell(state.facts.paged_index, labels)

    def end_forward(self, ids: Tensor | None) -> None:
        end_forward(self, ids)
        if self.elsewhere.num_unpaged and not self._has_warned:
            self._has_warned = True
            warn_if_idle(self, stacklevel=3)

    def leave_forward(self) -> None:
        if self.site.exchange is not None and self.step.change is not None:
            self.site.exchange.note_failure()

    def skip_forward(self) -> None:
        """Note that a forward pass of `generate` did not use this cache, which it was given.

        Guidance runs one such pass after each pass with the cache; after two in a row, warn.
        """
        self._num_skipped += 1
        if self._num_skipped == 2:
            self.note = warn_of_another_cache(self)

    def compress(self) -> None:
        """Seal and evict down to the budget now, as at the end of a document or of `holding()`."""
        compress(self)

    # ---- copies ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), binding=None, _finalizer=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a cache with its tokens; it is unattached until `attach`."""
        vars(self).update(state)
        for paged in self.states:
            paged.join(self.elsewhere)

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self.plain_class or type(self)
        return _unattached, (plain, self.native_class), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self.model is not None:
            new.attach(self.model)
        return new


def _unattached(plain: type[AttachedCache], native: type[DynamicCache] | None) -> AttachedCache:
    new: Any = object.__new__(with_native(plain, native))
    return new
