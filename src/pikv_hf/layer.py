"""One full-attention layer of the cache: an open tail and sealed pages."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .autocast import without_autocast
from .checks import check_crop
from .context import CONTEXT
from .guard import Guard
from .listing import Listed
from .model.geometry import alike
from .observed import Observed
from .pages import PageTable
from .probe import Probe
from .records import settle_held
from .sealing import seal_excess
from .shared import Shared, newest_columns, visible_columns
from .span import Span
from .tail import Tail, roomy


class PagedLayer(Listed):
    """Keys and values of one attention layer, as a tail in model dtype and sealed pages.

    `update` appends and returns the new tokens only: the attention function reads the rest from
    here. In a layer that turns out not to be ours to read (`unpaged` says why), everything stays in
    the tail and `update` returns all of it.
    """

    def __init__(self, layer_idx: int, shared: Shared, config: PreTrainedConfig) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.shared = shared
        self._tail: Tail | None = None
        compressor = shared.compressor.bind(config, layer_idx)
        self.pages = PageTable(compressor, shared.page_size)
        # Which paged layer of how many this is.
        self.place = (0, 1)
        self.scale = 1.0
        self.guard, self.probe = Guard(), Probe(shared.probe)
        wanted, scheduler = (compressor, self.probe), shared.scheduler
        self.observed = Observed.wanted_by(wanted if scheduler is None else (*wanted, scheduler))
        self.seen = 0
        # `seen` at the end of the prompt; what came later was generated.
        self.prompt_end = 0
        self.due = 0  # `seen` from which on some of the tail may have to be sealed
        # Tokens of each row, padding not counted, that are no longer in the tail.
        self.left: list[int] = []
        self.unpaged: str | None = None
        # Width of the latent that `kv_b_proj` expands; None when keys and values are cached as such.
        self.latent_rank: int | None = None
        self.expected_rank: int | None = None
        self.has_gate = self.is_first = False
        self.awaits: str | None = None
        self._mask: Tensor | None = None
        self._geometry: tuple[Any, ...] = ()
        self.record_past = False

    @property
    def tail(self) -> Tail:
        """The open tokens, once the layer has been written to (`is_initialized`)."""
        assert self._tail is not None, "nothing has been cached yet"
        return self._tail

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `key_states` [B, H, T, Dk] and `value_states` [B, H, T, Dv].

        Returns the new tokens alone, which the attention function completes, or everything in an
        unpaged layer. Stored tensors carry no gradient.
        """
        self._check(key_states, value_states)
        self.shared.note_written()
        if self.unpaged is None:
            self.awaits = "attention"
        if self.seen == 0:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._stored(key_states, value_states)
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()
        self.is_first = self.seen == 0
        if self.is_first:
            self._tail, self.left = Tail(keys, values), [0] * keys.shape[0]
        else:
            scratch = self.shared.scratch if self._seals else None
            held = self.tail.length + key_states.shape[2]
            self.tail.append(keys, values, self._capacity(held), scratch)
        self.seen += key_states.shape[2]
        self._note_prompt(key_states.shape[2])
        if self.unpaged is not None:
            self.shared.unpaged[self.layer_idx] = self.tail
            CONTEXT.layer = self
            keys, values = self._given()
            return keys.to(key_states.dtype), values.to(value_states.dtype)
        CONTEXT.layer = self
        return key_states, value_states

    def _note_prompt(self, length: int) -> None:
        """The newest `length` tokens may be of the prompt; drafted ones are not, if that is known."""
        known = self.shared.prompt_length
        is_prompt = self.shared.is_prompt(self.seen - length, length)
        if self.is_first or (is_prompt and not (self.record_past and known is None)):
            self.prompt_end = self.seen if known is None else min(self.seen, known)
            self.due = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = self.shared.placement.pool_of(key_states)
        is_latent = key_states.shape[1] == 1 and key_states.shape[3] == self.expected_rank
        self.latent_rank = self.expected_rank if is_latent else None
        self._tail = Tail(*self._stored(key_states[:, :, :0], value_states[:, :, :0]))
        self.is_initialized = True

    def _stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A latent and its rotary key stand side by side, as one key without a value."""
        keys, values = alike(keys, values)
        if self.latent_rank is None:
            return keys, values
        return torch.cat([keys, values], dim=-1), keys[..., :0]

    def _given(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tail as `update` was given them, a latent and its rotary key apart."""
        keys, values = self.tail.view()
        if self.latent_rank is None:
            return keys, values
        return keys[..., : self.latent_rank], keys[..., self.latent_rank :]

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if self.awaits is not None:
            raise RuntimeError(
                f"layer {self.layer_idx}: the model cached new tokens before PiKVCache saw the "
                f"{self.awaits} of the last ones; the model's forward was changed after the cache "
                "was attached, or was interrupted (then call `cache.reset()`)."
            )
        got = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.shape[0])
        if self.seen == 0:
            self._geometry = got[:4]
        elif got != (*self._geometry, self.tail.batch):
            raise ValueError(
                f"layer {self.layer_idx}: keys and values of (heads, key dim, value dim, dtype, batch) "
                f"= {got} were given to a cache of {(*self._geometry, self.tail.batch)}; use a new "
                "PiKVCache, or `cache.reset()`, for another batch."
            )

    def _capacity(self, held: int) -> int:
        """Tokens a tail buffer is made for, to hold so many and more."""
        tokens = roomy(held, max(self.seen, held), self.tail.token_bytes)
        return min(tokens, self.shared.window + self.shared.page_size) if self._seals else tokens

    @property
    def _seals(self) -> bool:
        """Whether the tail is kept short."""
        return self.unpaged is None and not self.record_past and not self.shared.holding

    @property
    def generated(self) -> int:
        """Tokens behind the prompt."""
        return self.seen - self.prompt_end

    @without_autocast
    def observe(self, query: Tensor, mask: Tensor | None, scale: float) -> None:
        """Keep the newest of the queries [B, Hq, q, D] that are asked of this layer's keys.

        `scale` is the factor of their products.
        """
        self.scale = scale
        visible, length = None, query.shape[2]
        if length > 1 and mask is not None:
            key = (mask, length)
            visible = self.shared.remember("visible", key, lambda: visible_columns(*key))
        heads = self.tail.keys.shape[1]
        self.observed.append(query.unflatten(1, (heads, -1)), visible)

    def finish(self, mask: Tensor | None) -> None:
        """Attention has run with `mask`: seal, or wait for the labels that come before sealing."""
        self._mask = mask
        if not self._seals and mask is not None:
            # Of a whole prompt's mask only what its newest query sees is kept.
            key = (mask, self.tail.length)
            self._mask = self.shared.remember("held", key, lambda: newest_columns(*key))
        if self.shared.holding and self.observed.pending is not None:
            self.shared.note_sealed()
            settle_held(self, self._mask)
        if self.has_gate and self.shared.needs_labels and self.unpaged is None:
            self.awaits = "experts"
        else:
            self.awaits = None
            self.seal()

    def label(self, experts: Tensor, weights: Tensor) -> None:
        """Experts [B, q, k] and weights [B, q, k] of the newest tokens; then seal."""
        labels = {"experts": experts.to(torch.int16)[:, None], "weights": weights[:, None]}
        self.tail.label(Span(labels))
        self.awaits = None
        self.seal()

    def seal(self) -> None:
        """Move the oldest tokens of a full tail into pages."""
        if not self._seals:
            return
        count = seal_excess(self, self._mask)
        if count > 0 or self.is_first:
            capacity = self._capacity(self.tail.length - count)
            self.tail.drop(count, capacity, self.shared.scratch, is_own=not self.is_first)
        self._mask = None

    def compress(self) -> None:
        """Seal what was held back."""
        if self.is_initialized and self._seals:
            self.is_first = True  # the buffer was made for more than a tail
            self.seal()

    def get_seq_length(self) -> int:
        """Tokens ever seen, dropped ones included: positions stay true."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask's columns: the tail and the new tokens."""
        if self.shared.full_mask:
            return self.seen + query_length, 0
        tail = self._tail.length if self._tail is not None else 0
        return tail + query_length, self.seen - tail

    def activate_past_recording(self) -> None:
        """Until the next `crop` nothing is sealed, so that drafted tokens can be taken back."""
        self.record_past = self.observed.is_drafting = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens; 0 only ends a verification."""
        check_crop(self, tokens_to_remove)
        target = self.seen + tokens_to_remove
        if not self.is_initialized:
            return
        if target == 0:
            return self.reset()
        sealed = self.seen - self.tail.length
        if target < sealed:
            self.pages.crop(target)
        mask = self._mask
        self.tail.truncate(max(target - sealed, 0))
        self.observed.truncate(-tokens_to_remove, self.tail.length)
        self.seen, self.prompt_end, self.due = target, min(self.prompt_end, target), 0
        if self.record_past:
            self._mask = mask if mask is None else mask[..., : mask.shape[-1] + tokens_to_remove]

    def seal_verified(self) -> None:
        """Seal, after a `crop` that ended a verification."""
        if self.record_past:
            self.record_past = False
            self.compress()
            self.record_past = True

    def reset(self) -> None:
        """Forget all tokens; the layer can be used for another batch, dtype or device."""
        self._tail, self.is_first = None, False
        self.seen = self.prompt_end = self.due = 0
        self.pages.slabs = []
        self.observed = self.observed.anew()
        self.guard.reset()
        self.probe.reset()
        self.record_past, self.awaits, self._mask = False, None, None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_rows(beam_idx.tolist(), beam_idx, free=False)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            index = torch.arange(self.tail.batch).repeat_interleave(repeats)
            self.map_rows(index.tolist(), index, free=False)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            index = torch.arange(self.tail.batch)[indices.cpu()]
            self.map_rows(index.tolist(), index, free=True)

    def map_rows(self, source: list[int], index: Tensor, *, free: bool) -> None:
        """New batch row i continues old batch row `source[i]`; `index` is the same as a tensor."""
        if self.seen:
            self.tail.map_rows(index)
            self.left = [self.left[row] for row in source]
            self.pages.map_rows(source, free=free)
            self.observed.map_rows(index)

    def held_tokens(self) -> int:
        """Tokens of the fullest row and KV head."""
        if self._tail is None:
            return 0
        sealed = [self.pages.held(row) for row in range(self.tail.batch)]
        return self.tail.length + max(0 if held is None else int(held.max()) for held in sealed)

    def tensors(self) -> Iterator[Tensor]:
        """Everything this layer holds."""
        if self._tail is not None:
            yield from self.tail.tensors()
        yield from self.pages.tensors()
        yield from self.observed.tensors()
        yield from self.probe.tensors()
        yield from self.scheduler_tensors()
        if self._mask is not None:
            yield self._mask

    def scheduler_tensors(self) -> Iterable[Tensor]:
        """What the scheduler holds for this layer, or reads of it."""
        scheduler, rotary = self.shared.scheduler, self.shared.rotaries.get(self.layer_idx)
        held = () if scheduler is None else scheduler.tensors(self.layer_idx)
        return (*held, *(() if rotary is None else (rotary.frequencies,)))
