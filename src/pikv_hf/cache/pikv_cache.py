"""PiKVCache: the object that a user passes as `cache`."""

import contextlib
import copy
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from typing_extensions import Self

from ..compressors import Compressor, Identity
from ..layer.paged_layer import PagedLayer
from ..model.parallel import parallelism
from ..model.wrappers import unwrap
from ..placements import Placement
from ..routers import Router
from ..schedulers import Scheduler
from ..validation import check_count
from .agreement import agreed
from .arguments import check_placement, make_settings
from .attachment import AttachedCache
from .checks import check_whole
from .cropping import crop
from .plot import draw
from .report import Report, cache_bytes
from .site import ranks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a cache without a model takes: it acts on no page.
LOSSLESS_OPTIONS = ("interval", "page_size", "window")


class PiKVCache(AttachedCache):
    """A paged KV cache for Mixture-of-Experts models; pass it to the unchanged model.

    ```python
    cache = PiKVCache(model)
    model.generate(**inputs, cache=cache)
    print(cache.report())
    ```

    By default the cache is lossless: all tokens are kept, uncompressed, and read. Full-attention
    layers (also latent ones) are paged; every other layer keeps transformers' own cache layer.

    Args:
        model: the model that will use the cache, which attaches to it. The model is restored by
            `detach()`, at the end of a `with` block, or when its last cache is collected. A model
            wrapped by PEFT, torch.compile or DistributedDataParallel is accepted.
        config: a model's config instead of the model: a lossless cache without paged layers.
        scheduler: which tokens are kept: a name of `SCHEDULERS`, a `Scheduler`, or None for all.
        budget: how much the scheduler keeps: a number of tokens of each row and KV head (int), a
            share of the tokens that the row has seen (float in (0, 1]), or bytes of the whole cache
            ("2GiB": paged layers share what other layers leave); None = the scheduler's own. A dict
            gives separate `prefill` and `decode` budgets: without `prefill` a prompt is kept whole;
            without `decode` generated tokens add to the kept tokens of the prompt.
        sinks: first tokens of each row that the scheduler never evicts.
        interval: generated tokens between two evictions, in whole pages. Each eviction frees room
            for that many tokens, at most half of the budget. A larger interval is faster and holds
            less. None = a sixteenth of the budget; 1 = evict whenever a page is sealed.
        hold_prompt: evict and compress nothing of a prompt before its first generated token. A
            prompt read in pieces then gives the result of one read at once, but is held whole until
            then. Otherwise tokens are evicted after every piece. In your own loop, a forward pass
            of one token counts as generation, except within `holding()`.
        compressor: how sealed pages are stored: a name of `COMPRESSORS`, a `Compressor`, or None
            for the model's dtype.
        router: which pages a generated token reads: a name of `ROUTERS`, a `Router`, or None for
            all. Routers that compare experts need a model with gates.
        placement: where pages live: a name of `PLACEMENTS` or a `Placement`. "spread" deals them to
            all devices that the model runs on, or under torchrun to all ranks that run its attention
            on one batch.
        process_group: the ranks that share the cache: a `ProcessGroup`, or a `DeviceMesh` of one
            dimension or two (node, rank). All ranks must make the cache, and use it, together.
        kv_device_map: devices of pages by prefixes of modules, as `device_map` in accelerate:
            `{"layers.0-11": "cuda:0", "layers.12.experts.0-31": "cuda:1", "": "cpu"}`. See `DeviceMap`,
            which also takes `max_memory`.
        page_size: tokens of a page; "auto" = the size with which a router reads least, 16 to 64.
        window: newest tokens that are not sealed (so neither compressed nor evicted); None = 128,
            or 512 if nothing is compressed or evicted, and at most half of a budget given in tokens
            or as a share. A given window is cut, too, where a share is not larger than it.
        probe: measure for `report()`, whenever pages are sealed, the error that this causes in the
            output of attention: this costs as much as sealing twice, and attention of 16 queries. With
            a router, also measure the share of attention that falls on what is read: attention is
            then computed twice.

    Raises:
        TypeError, ValueError: an argument is invalid; the model is left as it was.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        config: PreTrainedConfig | None = None,
        scheduler: str | Scheduler | None = None,
        budget: int | float | str | Mapping[str, int | float | str] | None = None,
        sinks: int = 0,
        interval: int | None = None,
        hold_prompt: bool = False,
        compressor: str | Compressor | None = None,
        router: str | Router | None = None,
        placement: str | Placement | None = None,
        process_group: Any = None,
        kv_device_map: Mapping[str, Any] | None = None,
        page_size: int | str = 64,
        window: int | None = None,
        probe: bool = False,
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
        options: dict[str, Any] = {
            "scheduler": scheduler,
            "budget": budget,
            "sinks": sinks,
            "interval": interval,
            "hold_prompt": hold_prompt,
            "compressor": compressor,
            "router": router,
            "placement": placement,
            "process_group": process_group,
            "kv_device_map": kv_device_map,
            "page_size": page_size,
            "window": window,
            "probe": probe,
        }
        chosen = [k for k, v in options.items() if v not in (None, 0) and k not in LOSSLESS_OPTIONS]
        if config is not None and chosen:
            raise ValueError(
                f"`{chosen[0]}` needs an attached cache: pass the model, `PiKVCache(model, ...)`, "
                "instead of its config."
            )
        self._budget = budget
        if config is not None:
            self.make_parts(make_settings(options, config))
            self.fill(config)
            return
        inner = unwrap(model)
        try:
            placed = check_placement(placement, process_group, kv_device_map)
            with agreed(ranks_of(placed, parallelism(model)), inner, options):
                self.make_parts(make_settings(options, inner.config))
                self.attach(model)
        except BaseException:
            if self.binding is not None:
                self.detach()
            raise

    # ---- the Cache interface ----------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens, also tokens of a failed forward pass.

        Raises:
            ValueError: a positive number, more tokens than were seen, or, with a scheduler, more
                than the tail holds. The cache is left as it was.
            RuntimeError: a layer cannot restore its earlier state. The cache is left as it was.
        """
        crop(self, int(tokens_to_remove))  # transformers 5.17 passes a tensor

    def reset(self) -> None:
        """Forget all tokens; the cache can then be used for any batch."""
        layers = self.layers_to_be
        # Transformers' layers of fixed size keep their batch when they are reset: replace them.
        for idx, fresh in enumerate(DynamicCache(config=self.config).layers):
            if isinstance(layers[idx], PagedLayer):
                layers[idx].reset()
            else:
                layers[idx] = fresh
        self.log.reset()
        self.columns.reset()
        self.step.reset()
        self.finite.reset()
        self.start(layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let batch row i continue old row `beam_idx[i]`; pages are shared, not copied."""
        check_whole(self)
        source = beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.state.map_rows(source, beam_idx, free=False)
            else:
                layer.reorder_cache(beam_idx)
        self.log.map_rows(beam_idx)
        self.columns.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times; pages are shared, not copied."""
        check_count("repeats", repeats)
        rows = self.rows
        if rows is not None:  # every layer can be reordered, linear attention too
            return self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))
        check_whole(self)
        super().batch_repeat_interleave(repeats)
        if self.log.ids is not None:
            self.log.map_rows(torch.arange(len(self.log.ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`; the pages of other rows are freed."""
        check_whole(self)
        rows = self.rows
        super().batch_select_indices(indices)
        if self.log.ids is not None:
            self.log.map_rows(torch.arange(self.log.ids.shape[0])[indices.cpu()])
        if rows is not None:
            self.columns.map_rows(torch.arange(rows)[indices.cpu()])

    @contextlib.contextmanager
    def holding(self) -> Generator[Self, None, None]:
        """Hold all tokens within the block, unsealed; compress the cache at its end.

        ```python
        with cache.holding():
            for chunk in document.split(2048, dim=1):
                model(chunk, cache=cache)
        answers = model.generate(**questions, cache=cache.fork(n))
        ```

        A text read in several pieces within the block is kept as if it was read at once. An
        exception in the block also ends the holding, and is raised even if compressing then fails.
        """
        self.reading.begin_block()
        try:
            yield self
        except BaseException:
            with contextlib.suppress(Exception):  # the block's exception says more
                self._end_block()
            self.reading.release()
            raise
        self._end_block()

    def _end_block(self) -> None:
        change = self.step.change
        self.reading.end_block()
        if change is None or not change.is_half_done:
            self.compress()  # if it fails, it can be called again
        self.reading.release()

    def fork(self, n: int = 1) -> Self:
        """Return a new cache whose rows `i * n` to `i * n + n - 1` continue row i of this cache.

        Sealed pages are shared, not copied: useful for n questions about one document.
        """
        check_count("n", n)
        check_whole(self)
        shared = {id(t): t for state in self.states for t in state.pages.tensors()}
        new = copy.deepcopy(self, dict(shared))
        for state in (*self.states, *new.states):
            state.pages.mark_forked()
        if n > 1:
            new.batch_repeat_interleave(n)
        return new

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield keys, values and sliding window of each layer, as `DynamicCache` does."""
        check_whole(self)
        for layer in self.layers:
            states = layer.states() if isinstance(layer, PagedLayer) else (layer.keys, layer.values)
            yield *states, getattr(layer, "_sliding_window_tensor", None)

    # ---- what it holds ----------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that the cache keeps alive, labels and tables included.

        Pages in CPU memory count, pages in files (`Offload`) do not; `report()` lists both.
        """
        return cache_bytes(self)

    def report(self) -> Report:
        """Return what each layer holds; it prints as a table, and `.to_dict()` has the numbers."""
        return Report.of(self)

    def plot(self, row: int = 0) -> "Figure":
        """Draw which tokens each KV head holds of a batch `row`, and which it has read last.

        A second panel shows the pages by their most frequent expert, if they have labels, and a third
        one the recall, if a router and `probe=True` have measured it. Returns a matplotlib figure,
        which notebooks show; `figure.savefig(path)` writes it.

        Raises:
            ValueError: the cache holds nothing in paged layers, or has no such row.
        """
        return draw(self, row)

    def _repr_html_(self) -> str:
        """Render the report in a notebook."""
        return self.report()._repr_html_()

    def __repr__(self) -> str:
        settings = self.settings
        methods = {
            "scheduler": settings.scheduler,
            "budget": self._budget,
            "compressor": None if settings.compressor == Identity() else settings.compressor,
            "router": settings.router,
        }
        set_ones = "".join(f", {k}={v}" for k, v in methods.items() if v is not None)
        model = type(self.model).__name__ if self.model is not None else "unattached"
        layers, paged = len(self.layers_to_be), len(self.states)
        return (
            f"PiKVCache({model}{set_ones}, page_size={settings.page_size}, window={settings.window}, "
            f"layers={layers}, paged={paged}, seq_length={self.get_seq_length()})"
        )
