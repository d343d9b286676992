"""The state of one paged layer."""

import copy
import functools
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from ..model.rotary import Rotary
from ..placements.site import NO_SITE, PlacedLayer, Site
from ..routers import PageRouter
from ..schedulers import Needs
from ..storage.page_table import PageTable
from ..storage.tail import Tail
from .columns import Columns
from .loss_guard import Guard
from .loss_probe import Probe
from .observations import Observations
from .reading import Reading
from .routing import Routing
from .settings import Settings
from .step import Step


class Neighbours(ABC):
    """The other layers of a cache, as one paged layer sees them."""

    @property
    @abstractmethod
    def read_full_mask(self) -> bool:
        """True if an unpaged layer reads the mask of the model, which then spans all tokens."""

    @property
    @abstractmethod
    def num_unpaged(self) -> int:
        """Number of layers meant to be paged that our attention function cannot read."""

    @abstractmethod
    def nbytes(self, state: "LayerState") -> int:
        """Return the bytes held outside of paged layers by the time `state` seals again."""

    @abstractmethod
    def read_ahead(self, paged_index: int) -> None:
        """Announce that paged layer `paged_index` is read next; behind the last comes the first."""


@dataclass(frozen=True)
class CacheParts:
    """The objects that the layers of one cache share; each changes by its own methods only."""

    settings: Settings
    step: Step
    reading: Reading
    columns: Columns
    neighbours: Neighbours
    site: Site = NO_SITE


@dataclass(frozen=True)
class LayerFacts:
    """The properties of an attention layer of the model.

    `paged_index` numbers the `num_paged` layers to be paged, from 0. `has_gate`: a gate runs behind
    attention, which chooses from `num_experts` (None = no gate, or no method needs the number).
    `latent_rank`: width of the latents that the layer may cache; None = it caches keys and values.
    """

    layer_idx: int
    paged_index: int
    num_paged: int
    has_gate: bool = False
    num_experts: int | None = None
    latent_rank: int | None = None


class LayerState:
    """The data of one paged layer; the steps of the layer read it and change it by its methods.

    Shapes: B rows, H KV heads, T tokens, D head dim.

    Attributes:
        facts: properties of the layer in the model.
        settings, step, reading, columns, neighbours: objects shared with the other layers.
        module, rotary: the attention module, and the rotation of its keys; None while the cache is
            not attached, or if no method needs them.
        pages: the sealed tokens.
        routing: what the router selects from, and has selected.
        observed: queries and token statistics that methods need.
        num_seen: tokens ever seen, evicted ones included.
        prompt_end: `num_seen` at the end of the newest prompt; later tokens were generated.
        due: `num_seen` at which tail tokens may have to be sealed next.
        starts: the first column in the tail of each row. Earlier columns have left the tail of the
            row; the tail's buffer may still have them, because other rows need them.
        num_departed: tokens of each row, padding not counted, that have left the tail.
        unpaged_reason: why all tokens are kept in the tail; None = the layer is paged.
        latent_rank: width of the cached latents; None = keys and values.
        scale: the factor of queries times keys.
        is_first: True if the newest tokens are the first ones, and after `begin_compression`.
        geometry: heads, key dim, value dim and dtype of the tokens.
        awaits: the step needed before the next tokens: "attention", "experts" or None.
        sent: bytes that attention over pages has moved, by device, or by "ranks" from this rank.
        is_drafting: True if sealing waits for the next `crop`, which may remove drafted tokens.
    """

    def __init__(self, facts: LayerFacts, config: PreTrainedConfig, parts: CacheParts) -> None:
        self.facts = facts
        self.settings, self.step, self.reading = parts.settings, parts.step, parts.reading
        self.columns = parts.columns
        self.join(parts.neighbours)
        settings = parts.settings
        self.module: Any = None
        self.rotary: Rotary | None = None
        self.compressor = settings.compressor.bind(config, facts.layer_idx)
        layer = facts.layer_idx, facts.paged_index, facts.num_paged, facts.num_experts
        places = settings.placement.places(PlacedLayer(*layer), parts.site)
        router, digest = settings.router, None
        if isinstance(router, PageRouter):
            digest = functools.partial(router.digest, num_experts=facts.num_experts)
        self.pages = PageTable(self.compressor, settings.page_size, places, digest)
        self.routing = Routing()
        self.guard, self.probe = Guard(), Probe(settings.probe)
        queries = max(self.compressor.observed_queries, self.probe.observed_queries)
        self.observed = Observations.for_needs(settings.needs | Needs(queries=queries))
        self.num_seen = self.prompt_end = self.due = 0
        self.starts: tuple[int, ...] = ()
        # `first_in_tail` as of the last seal or crop: true even if an update failed half-way.
        self._first = 0
        self.num_departed: tuple[int, ...] = ()
        self.unpaged_reason: str | None = None
        self.latent_rank: int | None = None
        self.scale = 1.0
        self.is_first = self.is_drafting = False
        self.awaits: str | None = None
        self.geometry: tuple[Any, ...] = ()
        self.sent: Counter[str] = Counter()
        self._labels: tuple[Tensor, Tensor] | None = None
        self._tail: Tail | None = None

    @property
    def layer_idx(self) -> int:
        return self.facts.layer_idx

    @property
    def is_written(self) -> bool:
        """True if the layer has a tail."""
        return self._tail is not None

    @property
    def tail(self) -> Tail:
        """The newest tokens, once the layer has been written to."""
        assert self._tail is not None, "nothing has been cached yet"
        return self._tail

    @property
    def turning(self) -> Rotary:
        """Rotation of keys by their position, for a scheduler that needs it."""
        assert self.rotary is not None, "it is bound if the scheduler needs it"
        return self.rotary

    @property
    def first_in_tail(self) -> int:
        """Column of the first token in the tail's buffer."""
        return self.num_seen - self.tail.length

    @property
    def num_generated(self) -> int:
        """Number of tokens behind the prompt."""
        return self.num_seen - self.prompt_end

    @property
    def seals(self) -> bool:
        """True if tail tokens are to be sealed now."""
        is_paged = self.unpaged_reason is None
        return is_paged and not self.is_drafting and not self.reading.is_held

    @property
    def neighbours(self) -> Neighbours:
        """The other layers of the cache."""
        neighbours = None if self._neighbours is None else self._neighbours()
        if neighbours is None:
            raise RuntimeError(f"layer {self.layer_idx}: the PiKVCache of this layer is gone.")
        return neighbours

    def join(self, neighbours: Neighbours) -> None:
        """Join a cache with these layers, without keeping the cache alive."""
        self._neighbours: weakref.ref[Neighbours] | None = weakref.ref(neighbours)

    # ---- tokens ---------------------------------------------------------------------------------

    def bind(self, module: Any, rotary: Rotary | None) -> None:
        """Attach the layer to `module` of a model; None detaches it."""
        self.module = module
        if rotary is not None:
            self.rotary = rotary

    def fix_geometry(self, keys: Tensor, values: Tensor) -> None:
        """Fix heads, dims and dtype of all tokens, as in `keys` [B, H, T, Dk] and `values`."""
        self.geometry = keys.shape[1], keys.shape[3], values.shape[3], keys.dtype

    def open(self, keys: Tensor, values: Tensor, latent_rank: int | None) -> None:
        """Start a tail with `keys` [B, H, T, Dk] and `values`, as they are stored."""
        self._tail, self.latent_rank = Tail(keys, values), latent_rank
        self.starts = self.num_departed = (0,) * keys.shape[0]
        self._first = 0

    def begin_update(self) -> bool:
        """Set and return `is_first`: True if no token was written before."""
        self.is_first = self.num_seen == 0
        return self.is_first

    def note_update(self, length: int) -> None:
        """Note that `length` tokens were written to the tail, of the prompt or generated.

        While drafting, and if the length of the prompt is not known, only the first tokens count as
        the prompt.
        """
        before, known = self.num_seen, self.reading.prompt_length
        self.num_seen = before + length
        is_prompt = self.reading.is_prompt(before, length)
        if self.is_first or (is_prompt and not (self.is_drafting and known is None)):
            self.prompt_end = self.num_seen if known is None else min(self.num_seen, known)
            self.due = 0

    def hold_labels(self, labels: tuple[Tensor, Tensor] | None) -> None:
        """Hold experts and weights [B, T, k] of the newest tokens until their attention has run."""
        self._labels = labels

    def take_labels(self) -> tuple[Tensor, Tensor] | None:
        """Return the labels held, and forget them."""
        labels, self._labels = self._labels, None
        return labels

    def wait_for(self, what: str | None) -> None:
        """Require `what` before the next tokens: "attention", "experts" or None."""
        self.awaits = what

    def judge(self, unpaged_reason: str | None) -> None:
        """Page the layer if `unpaged_reason` is None, else leave all its tokens in the tail."""
        self.unpaged_reason = unpaged_reason

    def set_scale(self, scale: float) -> None:
        self.scale = scale

    # ---- sealing --------------------------------------------------------------------------------

    def expect_sealing(self, due: int) -> None:
        """Skip sealing until `due` tokens were seen."""
        self.due = due

    def depart(self, starts: tuple[int, ...], num_departed: tuple[int, ...]) -> None:
        """Note the new `starts`, and how many tokens of each row have left the tail."""
        self.starts, self.num_departed = starts, num_departed
        self._first = min(starts)

    def begin_compression(self, *, is_due: bool) -> None:
        """Let the next seal replace the tail's buffer, which was made for held-back tokens.

        If `is_due`, the next seal also stops waiting for `due`.
        """
        self.is_first = True
        if is_due:
            self.due = 0

    def begin_drafting(self) -> None:
        self.is_drafting = True
        self.observed.begin_drafting()

    def set_drafting(self, is_drafting: bool) -> None:
        self.is_drafting = is_drafting

    # ---- taking tokens back, rows ---------------------------------------------------------------

    def crop(self, target: int) -> None:
        """Keep the oldest `target` of the tokens seen."""
        removed, first = self.num_seen - target, self.first_in_tail
        if target < max(self.starts):
            self.starts = tuple(min(start, target) for start in self.starts)
            self.num_departed = tuple(self.columns.counts(self.starts))
            self._first = min(self._first, target)
            self.pages.crop(target)
            self.routing.set_resident(None)
        self.tail.truncate(max(target - first, 0))
        visible = self.columns.visible(target, self.num_seen)
        self.observed.truncate(removed, self.tail.length, visible)
        self.num_seen, self.prompt_end = target, min(self.prompt_end, target)
        if not self.is_drafting:
            self.due = 0

    def drop_unread(self, seen: int) -> None:
        """Drop tokens of a failed pass, behind the first `seen`, that attention has not read."""
        first = self._first
        if self.awaits == "attention":
            self.tail.truncate(min(self.tail.length, seen - first))
        self.num_seen, self.awaits = first + self.tail.length, None

    def reset(self) -> None:
        """Forget all tokens."""
        self._tail, self.is_first = None, False
        self.num_seen = self.prompt_end = self.due = 0
        self.pages.clear()
        self.routing.reset()
        self.observed = self.observed.anew()
        self.guard.reset()
        self.probe.reset()
        self.is_drafting, self.awaits = False, None
        self.sent.clear()

    def map_rows(self, source: list[int], index: Tensor, *, free: bool) -> None:
        """Let new batch row i continue old row `source[i]`; `index` is `source` as a tensor."""
        if self.num_seen:
            self.tail.map_rows(index)
            self.starts = tuple(self.starts[row] for row in source)
            self.num_departed = tuple(self.num_departed[row] for row in source)
            self.pages.map_rows(source, free=free)
            self.routing.map_rows(index)
            self.observed.map_rows(index)

    # ---- a repetition, which is taken back ------------------------------------------------------

    def listen(self, listener: Observations) -> None:
        """Let `listener` replace the observations until `restore`."""
        self.observed = listener

    def saved(self) -> tuple[Observations, int]:
        """Return the attributes that `restore` sets again."""
        return self.observed, self.prompt_end

    def restore(self, saved: tuple[Observations, int]) -> None:
        self.observed, self.prompt_end = saved
        self.awaits = None

    # ---- what it holds --------------------------------------------------------------------------

    def held_tokens(self) -> int:
        """Return the columns of the tail plus the sealed tokens of the fullest row and KV head."""
        if self._tail is None:
            return 0
        sealed = [self.pages.held(row) for row in range(self.tail.batch)]
        return self.tail.length + max(0 if held is None else int(held.max()) for held in sealed)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that this layer holds."""
        if self._tail is not None:
            yield from self.tail.tensors()
        yield from self.pages.tensors()
        yield from self.routing.tensors()
        yield from self.observed.tensors()
        yield from self.probe.tensors()
        yield from self.scheduler_tensors()

    def scheduler_tensors(self) -> Iterable[Tensor]:
        """Return the scheduler's tensors for this layer, and the frequencies of `rotary`."""
        scheduler = self.settings.scheduler
        held = () if scheduler is None else scheduler.tensors(self.layer_idx)
        return (*held, *(() if self.rotary is None else (self.rotary.frequencies,)))

    # ---- copies ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model and the cache: a copy of the cache joins its layers again."""
        return vars(self) | {"module": None, "_neighbours": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerState":
        """Copy the data of the layer. A layer that is copied alone stays in its cache.

        The looped model dory copies layers alone. When a whole cache is copied, `memo` has the
        copies of the objects that its layers share.
        """
        new = object.__new__(LayerState)
        memo[id(self)] = new
        parts = {name: getattr(self, name) for name in ("settings", "step", "reading", "columns")}
        copied = {name: memo.get(id(part), part) for name, part in parts.items()}
        neighbours = memo.get(id(self.neighbours), self.neighbours)
        own = {k: v for k, v in vars(self).items() if k not in (*parts, "module", "_neighbours")}
        vars(new).update(copied, **copy.deepcopy(own, memo))
        new.join(neighbours)
        new.module = self.module if neighbours is self.neighbours else None
        return new
