"""PiKVCache: the object that a user passes as `past_key_values`."""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from typing_extensions import Self

from .compressors import COMPRESSORS, Compressor, Identity
from .context import CONTEXT
from .layer import PagedLayer, Shared
from .methods import resolve
from .native import model_cache_class, reads_full_mask, release_prompt, with_native
from .placement import PLACEMENTS, Local, Placement
from .routers import ROUTERS, Router
from .schedulers import SCHEDULERS, Scheduler
from .settings import check_budget, check_count, default_window
from .token_log import TokenLog


def _checked(name: str) -> Callable[..., Any]:
    """The method `name` of transformers' Cache, for the model that the cache is attached to."""

    def method(self: "PiKVCache", *args: Any, **kwargs: Any) -> Any:
        self._check_use()
        return getattr(super(PiKVCache, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


class PiKVCache(Cache):
    """A paged KV cache for Mixture-of-Experts models; pass it to the unchanged model.

    ```python
    cache = PiKVCache(model)
    model.generate(**inputs, past_key_values=cache)
    print(cache.report())
    ```

    By default everything is kept, uncompressed, and read: lossless. Full-attention layers (also
    latent ones) are paged; every other layer keeps transformers' own cache layer.

    Args:
        model: the model that will use the cache; it is attached, and restored by `detach()`, at the
            end of a `with` block, or when the last cache of it is collected. A model wrapped by
            PEFT or torch.compile is accepted.
        config: instead of a model, its config: an unattached cache, lossless and without methods.
        scheduler: which tokens stay: a name of `SCHEDULERS`, a `Scheduler`, or None for all.
        budget: tokens that the scheduler keeps for each row and KV head: a number of tokens (int),
            or a share of the tokens seen (float in (0, 1]); None = the scheduler's own.
        compressor: how sealed pages are stored: a name of `COMPRESSORS`, a `Compressor`, or None
            for the model's dtype.
        router: which pages a query reads: a name of `ROUTERS`, a `Router`, or None for all. With a
            router, pages carry the experts that the model chose for their tokens.
        placement: where pages live: a name of `PLACEMENTS` or a `Placement`.
        page_size: tokens of a page.
        window: newest tokens that are never sealed (nor compressed or dropped); None = 128, at most
            half of a budget given in tokens, and 512 without any method.

    Raises:
        TypeError, ValueError: an argument is not what it must be; the model is left as it was.
    """

    # Set where the model insists on a cache class of its own (MiniMax), which is then mixed in.
    plain_class: "type[PiKVCache] | None" = None
    native_class: type[DynamicCache] | None = None

    def __new__(cls, model: Any = None, **kwargs: Any) -> Self:
        native = None
        if model is not None:
            from .attach import unwrap

            native = model_cache_class(unwrap(model))
        return object.__new__(with_native(cls, native))

    def __init__(
        self,
        model: Any = None,
        *,
        config: PreTrainedConfig | None = None,
        scheduler: str | Scheduler | None = None,
        budget: int | float | None = None,
        compressor: str | Compressor | None = None,
        router: str | Router | None = None,
        placement: str | Placement | None = None,
        page_size: int = 64,
        window: int | None = None,
    ) -> None:
        if (model is None) == (config is None):
            given = "neither" if model is None else "both"
            raise ValueError(
                f"`model` or `config` must be given: exactly one of them, not {given}."
            )
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"`config` is a {type(config).__name__}; it must be the PreTrainedConfig of a model."
            )
        methods = {"scheduler": scheduler, "compressor": compressor, "router": router}
        if config is not None:
            needing = [name for name, method in methods.items() if method is not None]
            if needing or budget is not None:
                name = (needing or ["budget"])[0]
                raise ValueError(
                    f"`{name}` needs an attached cache: pass the model, `PiKVCache(model, ...)`, "
                    "instead of its config."
                )
        scheduler = resolve("scheduler", scheduler, SCHEDULERS, Scheduler)
        check_budget(budget, scheduler)
        tokens = scheduler.budget(0) if scheduler is not None and budget is None else budget
        self.shared = Shared(
            compressor=resolve("compressor", compressor, COMPRESSORS, Compressor) or Identity(),
            scheduler=scheduler,
            router=resolve("router", router, ROUTERS, Router),
            placement=resolve("placement", placement, PLACEMENTS, Placement) or Local(),
            page_size=check_count("page_size", page_size),
            window=default_window(window, tokens, lossless=not any(methods.values())),
            budget=budget,
        )
        self.binding = None
        self.log = TokenLog()
        self._finalizer: Any = None
        if config is not None:
            self._fill(config)
        else:
            self.attach(model)

    # ---- attaching --------------------------------------------------------------------------

    def attach(self, model: Any) -> "PiKVCache":
        """Attach to `model`: a cache that was detached, loaded, or not yet attached. Returns self.

        A cache that holds tokens must be attached to the model, or a copy of the model, that made
        them.
        """
        from .attach import binding_of, unwrap

        if self.binding is not None:
            raise RuntimeError("this PiKVCache is attached already: call `cache.detach()` first.")
        model = unwrap(model)
        binding = binding_of(model)
        if self.shared.router is not None and not binding.gate_of:
            raise ValueError(
                f"`router` is {self.shared.router}, which needs the gates of an MoE model; "
                f"{type(model).__name__} declares none in `_can_record_outputs`."
            )
        if not hasattr(self, "layers"):
            self._fill(model.config, binding)
        elif type(model.config) is not type(self.config) or self._paged() != list(
            binding.attention
        ):
            raise ValueError(
                f"this PiKVCache was made for a model of {type(self.config).__name__} with paged "
                f"layers {self._paged()}; it cannot be attached to {type(model).__name__}."
            )
        binding.acquire(labels=self.shared.router is not None)
        self.binding, self.shared.attached = binding, True
        self._finalizer = weakref.finalize(self, binding.release)
        return self

    def detach(self) -> None:
        """Let go of the model, which is as it was before once its last cache has done so."""
        if self._finalizer is not None:
            self._finalizer()
        self.binding, self.shared.attached, self._finalizer = None, False, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that this cache is attached to."""
        return None if self.binding is None else self.binding.model()

    def _fill(self, config: PreTrainedConfig, binding: Any = None) -> None:
        """Make the layers: transformers' own, with every plain full-attention layer paged."""
        self.config = config
        layers = DynamicCache(config=config).layers
        for idx, modules in {} if binding is None else binding.attention.items():
            layers[idx] = paged = PagedLayer(idx, self.shared)
            paged.has_gate = idx in binding.gate_of
            if hasattr(modules[0], "kv_b_proj"):
                paged.expected_rank = getattr(modules[0], "kv_lora_rank", None)
        self._has_paged = any(isinstance(layer, PagedLayer) for layer in layers)
        self.shared.full_mask = any(reads_full_mask(layer) for layer in layers)
        self._start(layers)

    def _start(self, layers: list[Any]) -> None:
        """Initialise the base classes, with these layers.

        A model's own cache class expects layers to appear as they are first written.
        """
        self._unwritten: list[Any] = []
        if self.native_class is not None:
            self.native_class.__init__(self)
            layers, self._unwritten = [], layers
        Cache.__init__(self, layers=layers)

    def _paged(self) -> list[int]:
        layers = self.layers + self._unwritten
        return [idx for idx, layer in enumerate(layers) if isinstance(layer, PagedLayer)]

    @property
    def rows(self) -> int | None:
        """Batch rows that the cache holds, as far as its paged layers tell."""
        tails = (layer.tail for layer in self.layers if isinstance(layer, PagedLayer))
        return next((tail.batch for tail in tails if tail is not None), None)

    # ---- the Cache interface ----------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new states of one layer; returns what its attention function expects."""
        self._check_use()
        while len(self.layers) <= layer_idx and self._unwritten:
            self.layers.append(self._unwritten.pop(0))
        layer = self.layers[layer_idx]
        states = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, PagedLayer):
            release_prompt(layer)
        return states

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
            raise ValueError(
                "this PiKVCache was given to a model that it is not attached to: make one for "
                "this model with `PiKVCache(model)`."
            )

    def end_forward(self, ids: Tensor | None) -> None:
        """A forward pass of the token `ids` has ended: was every attention and gate heard?"""
        self.shared.memo.clear()
        for layer in self.layers:
            if isinstance(layer, PagedLayer) and layer.awaits is not None:
                raise RuntimeError(
                    f"layer {layer.layer_idx}: PiKVCache did not see the {layer.awaits} of this "
                    "forward pass. If a kernel or quantized module replaced the model's own "
                    "(`use_kernels=True`, MXFP4), load the model without it or use router=None."
                )
        self.log.append(ids)

    def label(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        """Label the newest tokens of a layer: `experts` and `weights` [B * q, k]."""
        layer = self.layers[layer_idx]
        if isinstance(layer, PagedLayer) and layer.awaits == "experts":
            shape = (layer.tail.batch, -1, experts.shape[-1])
            layer.label(experts.view(shape), weights.detach().view(shape))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number, more tokens than there are, or, with a scheduler, more
                than the open window holds. The cache is left as it was.
        """
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.log.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything; the cache can then be used for any batch."""
        layers = self.layers + self._unwritten
        # Transformers' layers of fixed size keep their batch when they are reset: made anew.
        for idx, fresh in enumerate(DynamicCache(config=self.config).layers):
            if isinstance(layers[idx], PagedLayer):
                layers[idx].reset()
            else:
                layers[idx] = fresh
        self.log = TokenLog()
        self._start(layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue row `beam_idx[i]`; pages are shared, not copied."""
        source = beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.map_rows(source, beam_idx, free=False)
            else:
                layer.reorder_cache(beam_idx)
        self.log.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times; pages are shared, not copied."""
        check_count("repeats", repeats)
        super().batch_repeat_interleave(repeats)
        if self.log.ids is not None:
            rows = torch.arange(self.log.ids.shape[0])
            self.log.map_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`; the pages of the others are freed."""
        super().batch_select_indices(indices)
        if self.log.ids is not None:
            self.log.map_rows(torch.arange(self.log.ids.shape[0])[indices.cpu()])

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of each layer, as `DynamicCache` yields them."""
        for layer in self.layers:
            states = layer.states() if isinstance(layer, PagedLayer) else (layer.keys, layer.values)
            yield *states, getattr(layer, "_sliding_window_tensor", None)

    # ---- what it holds ----------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that the cache keeps alive now, labels and tables included."""
        from .report import storage_bytes

        return storage_bytes(self)

    def report(self) -> Any:
        """What each layer holds; prints as a table, `.to_dict()` for the numbers."""
        from .report import Report

        return Report.of(self)

    def __repr__(self) -> str:
        shared = self.shared
        methods = {
            "scheduler": shared.scheduler,
            "budget": shared.budget,
            "compressor": None if shared.compressor == Identity() else shared.compressor,
            "router": shared.router,
        }
        set_ones = "".join(f", {k}={v}" for k, v in methods.items() if v is not None)
        paged = sum(isinstance(layer, PagedLayer) for layer in self.layers)
        model = type(self.model).__name__ if self.model is not None else "unattached"
        return (
            f"PiKVCache({model}{set_ones}, page_size={shared.page_size}, window={shared.window}, "
            f"layers={len(self.layers)}, paged={paged}, seq_length={self.get_seq_length()})"
        )

    # ---- copies -----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), binding=None, _finalizer=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A loaded cache holds its tokens and waits for `attach`."""
        vars(self).update(state)
        self.shared.attached = False

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self.plain_class or type(self)
        return _unattached, (plain, self.native_class), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVCache":
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self.model is not None:
            new.attach(self.model)
        return new


def _unattached(plain: type[PiKVCache], native: type[DynamicCache] | None) -> PiKVCache:
    return object.__new__(with_native(plain, native))
