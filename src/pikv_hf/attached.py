"""A cache that is bound to the model that uses it."""

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from typing_extensions import Self

from .checks import check_whole
from .context import CONTEXT
from .fit import check_fit, unlabelled, warn_if_idle, warn_of_another_cache
from .layer import PagedLayer
from .model.geometry import head_dims
from .model.modules import unpaged_reasons
from .model.versions import is_tested, unsupported
from .native import model_cache_class, reads_full_mask, release_prompt, with_native
from .repetition import repeat
from .shared import Change, Shared
from .token_log import TokenLog

if TYPE_CHECKING:
    from .attach import Binding


def _checked(name: str) -> Callable[..., Any]:
    """The method `name` of transformers' Cache, for the model that the cache is attached to."""

    def method(self: "AttachedCache", *args: Any, **kwargs: Any) -> Any:
        self._check_use()
        self.shared.note_written()
        return getattr(super(AttachedCache, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


class AttachedCache(Cache):
    """What makes a cache a part of its model: attaching, being written to, being copied.

    A subclass makes `shared` and calls `attach`, or `_fill` for a cache without a model.
    """

    shared: Shared
    log: TokenLog
    config: Any
    layers: list[Any]  # ours and every kind of transformers'
    binding: "Binding | None" = None
    _finalizer: Any = None
    note: str | None = None  # Why the cache is not used any more.
    _skipped, _has_warned = 0, False
    # Set where the model insists on a cache class of its own (MiniMax), which is then mixed in.
    plain_class: "type[AttachedCache] | None" = None
    native_class: type[DynamicCache] | None = None

    def __new__(cls, model: Any = None, **kwargs: Any) -> Self:
        native = None
        if model is not None:
            from .attach import unwrap

            native = model_cache_class(unwrap(model))
        new: Any = object.__new__(with_native(cls, native))
        return new

    def attach(self, model: Any) -> Self:
        """Attach to `model`: a cache that was detached, loaded, or not yet attached. Returns self.

        A cache that holds tokens must be attached to the model, or a copy of the model, that made
        them.
        """
        from .attach import LOCK, binding_of, unwrap

        if self.binding is not None:
            raise RuntimeError("this PiKVCache is attached already: call `cache.detach()` first.")
        model = unwrap(model)
        with LOCK:
            binding = binding_of(model)
            check_fit(self, model, binding)
            if self.shared.needs_rotary:
                self.shared.rotaries = binding.rotaries
            if not hasattr(self, "layers"):
                self._fill(model.config, binding)
            binding.acquire(labels=self.shared.needs_labels)
        self.binding, self.shared.attached = binding, True
        self.shared.modules = {idx: found[0] for idx, found in binding.attention.items()}
        self._finalizer = weakref.finalize(self, binding.release)
        warn_if_idle(self)
        return self

    def detach(self) -> None:
        """Let go of the model, which is as it was before once its last cache has done so."""
        if self._finalizer is not None:
            self._finalizer()
        self.binding, self.shared.attached, self._finalizer = None, False, None
        self.shared.modules = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that this cache is attached to."""
        return None if self.binding is None else self.binding.model()

    def _fill(self, config: Any, binding: Any = None) -> None:
        """Make the layers: transformers' own, with every plain full-attention layer paged."""
        self.config = config
        layers = DynamicCache(config=config).layers
        attention = {} if binding is None else binding.attention
        self._native = {} if binding is None else unpaged_reasons(config, attention)
        for number, (idx, modules) in enumerate(sorted(attention.items())):
            layers[idx] = paged = PagedLayer(idx, self.shared, config)
            paged.place = (number, len(attention))
            paged.pages.placement, paged.pages.tables = self.shared.placement, len(attention)
            self.shared.tables.append(paged.pages)
            paged.has_gate = idx in binding.gate_of
            if hasattr(modules[0], "kv_b_proj"):
                paged.expected_rank = getattr(modules[0], "kv_lora_rank", None)
            if (dims := head_dims(modules[0])) is not None:
                paged.pages.compressor.check_dims(*dims)
        self._has_paged = any(isinstance(layer, PagedLayer) for layer in layers)
        self.shared.full_mask = any(reads_full_mask(layer) for layer in layers)
        self._start(layers)

    def _start(self, layers: list[Any]) -> None:
        """Initialise the base classes, with these layers.

        A model's own cache class expects layers to appear as they are first written.
        """
        self._unwritten: list[Any] = []
        # Before 5.23 a block of nemotron_h without attention has a layer for states, always empty.
        types = getattr(self.config.get_text_config(decoder=True), "layer_types", None) or ()
        empty = {idx for idx, layer_type in enumerate(types) if layer_type in ("moe", "mlp")}
        unpaged = (idx for idx, layer in enumerate(layers) if not isinstance(layer, PagedLayer))
        others = [layers[idx] for idx in unpaged if idx not in empty]
        native: Any = self.native_class
        if native is not None:
            native.__init__(self)
            layers, self._unwritten = [], layers
        Cache.__init__(self, layers=layers)
        ours = {id(self.layers), id(self._unwritten)}
        others += [v for v in vars(self).values() if isinstance(v, list) and id(v) not in ours]
        self.shared.others, self.shared.unpaged = others, {}

    def _paged(self) -> list[int]:
        layers = enumerate(self.layers_to_be)
        return [idx for idx, layer in layers if isinstance(layer, PagedLayer)]

    @property
    def layers_to_be(self) -> list[Any]:
        """All layers, those that a model's own cache class has not yet got included."""
        return self.layers + self._unwritten

    @property
    def unpaged(self) -> dict[int, str]:
        """Why layers are not paged: from the start, or since their first tokens."""
        ours = (layer for layer in self.layers if isinstance(layer, PagedLayer))
        late = {layer.layer_idx: layer.unpaged for layer in ours if layer.unpaged is not None}
        return self._native | late

    @property
    def is_paged(self) -> bool:
        """Whether the attention of some layer reads pages."""
        return any(isinstance(x, PagedLayer) and x.unpaged is None for x in self.layers)

    @property
    def rows(self) -> int | None:
        """Batch rows that the cache holds, as far as its paged layers tell."""
        paged = (layer for layer in self.layers if isinstance(layer, PagedLayer))
        return next((layer.tail.batch for layer in paged if layer.is_initialized), None)

    @property
    def prompt_end(self) -> int:
        """Tokens up to the end of the newest prompt, as far as paged layers tell; 0 = unknown."""
        paged = (layer for layer in self.layers if isinstance(layer, PagedLayer))
        return next((layer.prompt_end for layer in paged if layer.is_initialized), 0)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new states of one layer; returns what its attention function expects."""
        self._check_use()
        while len(self.layers) <= layer_idx and self._unwritten:
            self.layers.append(self._unwritten.pop(0))
        layer = self.layers[layer_idx]
        if isinstance(layer, PagedLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        self.shared.note_written()
        states = layer.update(key_states, value_states, *args, **kwargs)
        release_prompt(layer)
        return states

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer holds a state, which models before 5.23 then write to in place."""
        if layer_idx is not None:
            self._check_use()
            self.shared.note_written()
        return super().has_previous_state(layer_idx, *args, **kwargs)

    get_conv_state = _checked("get_conv_state")  # whose result a model may write to
    get_recurrent_state = _checked("get_recurrent_state")
    update_conv_state = _checked("update_conv_state")
    update_recurrent_state = _checked("update_recurrent_state")
    update_indexer = _checked("update_indexer")

    def _check_use(self) -> None:
        """Refuse, before anything is written, a model that this cache is not attached to."""
        if not self._has_paged:
            return
        if not self.shared.attached:
            raise RuntimeError(
                "this PiKVCache is not attached to a model: call `cache.attach(model)` first."
            )
        if CONTEXT.cache is not self:
            if not is_tested() or CONTEXT.binding is self.binding:
                raise RuntimeError(
                    f"{unsupported()}: no argument of the model's forward pass is this PiKVCache."
                )
            raise ValueError(
                "this PiKVCache was given to a model that it is not attached to: make one for "
                "this model with `PiKVCache(model)`."
            )

    def use_forward(self) -> None:
        """A forward pass writes to this cache."""
        self._skipped, self.note = 0, None

    def skip_forward(self) -> None:
        """A forward pass of `generate` goes without this cache, which was passed to it.

        Guidance runs one of another prompt after each of ours; two are a cache that is given up.
        """
        self._skipped += 1
        if self._skipped == 2:
            self.note = warn_of_another_cache(self)

    def compress(self) -> None:
        """Seal, and drop what is over the budget, now: the end of a document, or of `holding()`."""
        check_whole(self)
        if self.shared.holding:
            repeat(self)
        self.shared.holding = False
        with self.shared.changing(Change(self.get_seq_length())):
            for layer in self.layers:
                if isinstance(layer, PagedLayer):
                    layer.compress()
        self.shared.end_forward()

    def check_idle(self) -> None:
        """Warn, once, if the first forward pass has shown that methods can do nothing."""
        if self.shared.unpaged and not self._has_warned:
            self._has_warned = True
            warn_if_idle(self)

    def awaits_experts(self, layer_idx: int) -> bool:
        """Whether the newest tokens of a layer still lack their labels."""
        layer = self.layers[layer_idx]
        return isinstance(layer, PagedLayer) and layer.awaits == "experts"

    def label(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        """Label the newest tokens of a layer: `experts` and `weights` [B * q, k]."""
        layer = self.layers[layer_idx]
        shape = (layer.tail.batch, layer.tail.unlabelled, experts.shape[-1])
        if len(experts) != shape[0] * shape[1]:
            raise RuntimeError(unlabelled(self, layer_idx, len(experts), shape[0] * shape[1]))
        layer.label(experts.view(shape), weights.detach().view(shape))

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), binding=None, _finalizer=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A loaded cache holds its tokens and waits for `attach`."""
        vars(self).update(state)

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
