"""One full-attention layer of the cache: a tail and sealed pages."""

from typing import Any

import torch
from torch import Tensor

from ..model.head_dims import alike
from ..model.masks import visible_columns
from ..storage.tail import roomy
from ..storage.token_table import TokenTable
from .allowance import tail_capacity
from .autocast import without_autocast
from .checks import check_crop, check_update, labels_of
from .dense_states import DenseStates, given
from .handoff import hand_over
from .records import settle_held
from .sealing import seal_excess
from .state import LayerState


class PagedLayer(DenseStates):
    """Keys and values of one attention layer: a tail in the model's dtype, and sealed pages.

    The steps of a forward pass are: `update` appends tokens and returns the new ones only, the
    attention function reads the rest from `state`, `observe` keeps queries, `finish` or `label`
    seals. A layer that our attention function cannot read (`state.unpaged_reason`) keeps all tokens
    in the tail, and `update` returns all of them.
    """

    def __init__(self, state: LayerState) -> None:
        self.state = state
        super().__init__()

    @property
    def record_past(self) -> bool:
        """True if drafted tokens may be taken back; transformers sets it."""
        return self.state.is_drafting

    @record_past.setter
    def record_past(self, record_past: bool) -> None:
        self.state.set_drafting(record_past)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        expert_ids: Tensor | None = None,
        expert_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append `key_states` [B, H, T, Dk] and `value_states` [B, H, T, Dv].

        Return the new tokens alone, because the attention function reads the older tokens itself;
        an unpaged layer returns all tokens. Stored tensors carry no gradient.

        `expert_ids` [B, T, k] and `expert_weights` [B, T, k] label the tokens, instead of the choice
        of the model's gate. Without weights, the k experts of a token have equal shares. They are
        ignored if no method needs labels.

        Raises:
            RuntimeError: the last tokens still wait for their attention or their experts.
            ValueError: heads, dims, dtype or batch differ from the tokens held, or labels do not fit
                the tokens.
        """
        state = self.state
        check_update(state, key_states, value_states)
        state.hold_labels(labels_of(state, key_states, expert_ids, expert_weights))
        state.step.note_written()
        if state.unpaged_reason is None:
            state.wait_for("attention")
        is_first = state.begin_update()
        if is_first:
            self.lazy_initialization(key_states, value_states)
        keys, values = stored(key_states, value_states, state.latent_rank)
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()
        if is_first:
            state.open(keys, values, state.latent_rank)
        else:
            tail, length = state.tail, key_states.shape[2]
            if not tail.has_room(length):
                buffer = state.step.buffer if state.seals else None
                tail.make_room(length, capacity(state, tail.length + length), buffer)
            tail.append(keys, values)
        state.note_update(key_states.shape[2])
        hand_over(self)
        if state.unpaged_reason is None:
            return key_states, value_states
        keys, values = given(*state.tail.view(), state.latent_rank)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        state = self.state
        self.device = key_states.device
        state.fix_geometry(key_states, value_states)
        rank = state.facts.latent_rank
        is_latent = key_states.shape[1] == 1 and key_states.shape[3] == rank
        rank = rank if is_latent else None
        state.open(*stored(key_states[:, :, :0], value_states[:, :, :0], rank), rank)
        self.is_initialized = True

    def observe(self, query: Tensor, scale: float) -> None:
        """Keep the newest of the queries [B, Hq, q, D] of this layer, as zeros at padding.

        `scale` is the factor of queries times keys.
        """
        self.state.set_scale(scale)
        keep_queries(self.state, query)

    def note_columns(self, mask: Tensor | None, length: int) -> None:
        """Note which columns are tokens, by the `mask` of attention with `length` new tokens.

        While `generate` decodes, all new columns are tokens: a mask on an accelerator is not read,
        so that nothing waits for the device.
        """
        state = self.state
        first, end, starts = state.first_in_tail, state.num_seen, state.starts

        def note() -> None:
            is_known = state.reading.is_decoding(end - length)
            if is_known and mask is not None and mask.device.type != "cpu":
                return state.columns.note(None, end - length, end, starts)
            visible = visible_columns(mask, end - first)
            state.columns.note(visible, first, end, starts)

        state.step.remember("noted", (mask, first, end), note)

    def finish(self) -> None:
        """End the attention step: seal, or wait for the labels that sealing needs."""
        state = self.state
        if state.reading.is_held and state.observed.pending is not None:
            state.step.note_sealed()
            settle_held(state)
        labels, is_paged = state.take_labels(), state.unpaged_reason is None
        if is_paged and labels is not None:
            self.label(*labels)
        elif is_paged and state.facts.has_gate and state.settings.needs_labels:
            state.wait_for("experts")
        else:
            state.wait_for(None)
            self.seal()

    def label(self, experts: Tensor, weights: Tensor) -> None:
        """Label the newest tokens with the gate's choice, experts and weights [B, q, k]; then seal.

        With `labels_by_earlier_gate` the choice of an earlier gate is stored instead, if there is one.

        Raises:
            ValueError: the newest tokens have labels.
        """
        state, earlier = self.state, None
        if not state.tail.unlabelled:
            raise ValueError(
                f"layer {state.layer_idx}: the newest tokens have their experts already."
            )
        chosen = {"experts": experts.to(torch.int16)[:, None], "weights": weights[:, None]}
        labels = TokenTable(chosen)
        if state.settings.labels_by_earlier_gate:
            index = state.facts.paged_index
            earlier = state.step.labels_before(index, state.tail.keys.device)
            state.step.note_labels(index, labels)
        state.tail.label(labels if earlier is None else earlier)
        state.wait_for(None)
        self.seal()

    def seal(self) -> None:
        """Seal the tail tokens that are due, and fit the tail's buffer to the rest."""
        state = self.state
        if not state.seals:
            return
        count = seal_excess(state)
        if count > 0 or state.is_first or state.tail.is_borrowed:
            left = state.tail.length - count
            room = min(capacity(state, left), left + state.settings.page_size)
            state.tail.drop(count, room, state.step.buffer, is_own=not state.is_first)

    def compress(self) -> None:
        """Seal tokens that were held back."""
        if self.is_initialized and self.state.seals:
            self.state.begin_compression(is_due=True)
            self.seal()

    def get_seq_length(self) -> int:
        """Return the number of tokens ever seen, evicted ones included, as positions require."""
        return self.state.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the mask: the tail and the new tokens.

        The mask covers all columns if a layer that is not paged reads it.
        """
        state = self.state
        if state.neighbours.read_full_mask:
            return state.num_seen + query_length, 0
        tail = state.tail.length if state.is_written else 0
        return tail + query_length, state.num_seen - tail

    def activate_past_recording(self) -> None:
        """Stop sealing until the next `crop`, so that drafted tokens can be taken back."""
        self.state.begin_drafting()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens; 0 removes none.

        Raises:
            ValueError: `tokens_to_remove` is positive or beyond the tokens seen; or a scheduler may
                have evicted tokens, and some to be removed have left the tail.
        """
        check_crop(self.state, tokens_to_remove)
        target = self.state.num_seen + tokens_to_remove
        if not self.is_initialized:
            return
        if target == 0:
            return self.reset()
        self.state.crop(target)

    def seal_verified(self) -> None:
        """Seal after a `crop` that ended a verification."""
        if self.state.is_drafting:
            self.state.set_drafting(False)
            if self.is_initialized and self.state.seals:
                self.state.begin_compression(is_due=False)
                self.seal()
            self.state.set_drafting(True)

    def reset(self) -> None:
        """Forget all tokens; the layer can be used for another batch, dtype or device."""
        self.state.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.map_rows(beam_idx.tolist(), beam_idx, free=False)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state.num_seen:
            index = torch.arange(self.state.tail.batch).repeat_interleave(repeats)
            self.state.map_rows(index.tolist(), index, free=False)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state.num_seen:
            index = torch.arange(self.state.tail.batch)[indices.cpu()]
            self.state.map_rows(index.tolist(), index, free=True)


@without_autocast
def keep_queries(state: LayerState, query: Tensor) -> None:
    """Keep the newest of the queries [B, Hq, q, D], zeros at padding."""
    visible = state.columns.visible(state.num_seen - query.shape[2], state.num_seen)
    if visible is not None and visible.all():
        visible = None
    state.observed.append(query.unflatten(1, (state.tail.keys.shape[1], -1)), visible)


def stored(keys: Tensor, values: Tensor, latent_rank: int | None) -> tuple[Tensor, Tensor]:
    """Return keys and values as stored: a latent and its rotary key become one key, no value."""
    keys, values = alike(keys, values)
    if latent_rank is None:
        return keys, values
    return torch.cat([keys, values], dim=-1), keys[..., :0]


def capacity(state: LayerState, held: int) -> int:
    """Return the capacity in tokens of a tail's buffer for `held` tokens and some to come."""
    tokens = roomy(held, max(state.num_seen, held), state.tail.token_bytes)
    # Padding behind the newest tokens of a row can make a tail longer than it should be.
    is_short = state.seals and held <= tail_capacity(state)
    return min(tokens, tail_capacity(state)) if is_short else tokens
