"""Repetition of a held text by the model, which marks each token with the attention that it gets.

Shapes: B rows, H KV heads, G query heads of each, q new tokens, n tail tokens, S keys, D head dim.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layer.observations import EVERY, Observations
from ..layer.paged_layer import PagedLayer
from ..layer.state import LayerState
from ..model.masks import visible_columns
from ..model.versions import with_cache
from ..schedulers.attention_mass import attention_weights
from .paged_cache import PagedCache
from .token_log import TokenLog

# Smallest mark of a repeated token; tokens that are not repeated have mark 0.
MIN_MARK = torch.finfo(torch.float32).tiny


def check_repetition(how: Any, model: PreTrainedModel, native: type | None) -> None:
    """Refuse a `model` that cannot repeat texts as `how` says; None = nothing is repeated.

    Raises:
        ValueError: tokens cannot be removed again, or the prompt exceeds the model's vocabulary.
    """
    if how is None:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder or native is not None:
        kind = "an encoder" if native is None else f"a cache class of its own, {native.__name__}"
        raise ValueError(f"`scheduler` is {how}, but {name} has {kind}: it cannot repeat a text.")
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if max(how.prompt_ids, default=0) >= size:
        raise ValueError(f"`prompt_ids` of {how} exceeds the {size} tokens of {name}.")


def check_held(cache: PagedCache, kwargs: dict[str, Any], length: int) -> None:
    """Refuse to read `length` tokens that the scheduler must have repeated, but that cannot be.

    Only the first text is repeated: later ones, such as questions about it, need not be held.

    Raises:
        ValueError: the first text is not held, or token ids are unknown.
    """
    how = cache.settings.needs.repetition
    if how is None:
        return
    if kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            f"the model was given embeddings, but `scheduler` is {how}, which repeats token ids: pass "
            "`input_ids`, to a model of text alone."
        )
    if cache.get_seq_length():
        return
    if cache.is_drafting:
        raise ValueError(
            f"a prompt was given together with drafted tokens to a cache with {how}: let the model "
            "read the prompt first, within `with cache.holding():`."
        )
    if length > 1 and not (cache.reading.is_held or cache.settings.holds_prompts):
        raise ValueError(
            f"a text of {length} tokens was given to a cache with {how}, which scores what is held "
            "back: read it within `with cache.holding():`, or make the cache with hold_prompt=True."
        )


class Listener(Observations):
    """Observations that a layer has while the model repeats `columns[r]` of its tail in row r.

    The first `lengths[r]` new tokens of row r are the repetition, which also reads the columns
    `sinks[r]`. `marks` [B, H, n]: the largest attention that each tail token got.
    """

    def __init__(self, state: LayerState) -> None:
        super().__init__(EVERY)
        self.state = state
        self.marks = state.tail.keys.new_zeros(
            *state.tail.keys.shape[:2], state.tail.length, dtype=torch.float32
        )
        self.columns: list[Tensor] = []
        self.sinks: list[Tensor] = []
        self.lengths: list[int] = []

    def hear(self, columns: list[Tensor], sinks: list[Tensor], lengths: list[int]) -> None:
        """Expect that the next forward pass repeats these columns of each row."""
        self.columns, self.sinks, self.lengths = columns, sinks, lengths

    def append(self, queries: Tensor, visible: Tensor | None) -> None:
        """Mark the repeated columns by `queries` [B, H, G, q, D] of new tokens; keep no query."""
        tail_keys = self.state.tail.view()[0]
        before = tail_keys.shape[2] - queries.shape[3]
        for row, (columns, sinks) in enumerate(zip(self.columns, self.sinks, strict=True)):
            count = self.lengths[row]
            if count:
                read = torch.cat([sinks, columns, torch.arange(before, before + count)])
                keys = tail_keys[row][:, read.to(tail_keys.device)]
                marks = largest(queries[row, :, :, :count], keys, self.state.scale)
                marks = marks[:, len(sinks) : len(sinks) + len(columns)].clamp_min(MIN_MARK)
                self.marks[row][:, columns.to(tail_keys.device)] = marks

    def truncate(self, removed: int, opened: int) -> None:
        """Do nothing: no queries of the removed tokens are kept."""


def largest(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the largest attention [H, S] of `queries` [H, G, q, D] to each of `keys` [H, S, D].

    The newest q keys belong to the queries' tokens, causally. Precision as in `attention_weights`.
    """
    count = queries.shape[2]
    newest = torch.arange(count, device=queries.device)[None, None]
    maxima = torch.zeros(keys.shape[:2], dtype=torch.float32, device=queries.device)
    for weights, _ in attention_weights(queries[None], keys[None], newest, count, scale):
        maxima = torch.maximum(maxima, weights[0].amax((1, 2)))
    return maxima


@torch.no_grad()
def repeat(cache: PagedCache) -> None:
    """Let the model repeat the tail tokens of `cache`, if its scheduler needs their marks.

    The repetition is removed again: the cache is as before, with the marks as token statistics.
    Nothing is repeated if the last forward pass has failed.
    """
    how = cache.settings.needs.repetition
    written = [state for state in cache.states if state.is_written]
    log, layers, seen = cache.log, list(cache.layers), cache.log.length
    if how is None or any(state.awaits or state.num_seen != seen for state in written):
        return
    listeners = [Listener(state) for state in written if state.unpaged_reason is None]
    if not listeners:
        return
    saved = [(state, state.saved()) for state in written]
    text = Text(cache, how, listeners[0].state)
    with cache.reading.prompt(None):
        try:
            for listener in listeners:
                listener.state.listen(listener)
            for number in range(text.chunks):
                chunk = text.chunk(number)
                for listener in listeners:
                    listener.hear(*chunk[:3])
                # Layers that are not paged cannot remove tokens: copies of them are used.
                twins = [x if isinstance(x, PagedLayer) else _twin(x) for x in layers]
                cache.stand_in(twins, TokenLog())
                text.read(*chunk[2:])
                for state in written:
                    state.crop(seen)
        finally:
            cache.stand_in(layers, log)
            cache.step.end()
            for state, before in saved:
                if state.num_seen > seen:
                    state.crop(seen)
                state.restore(before)
    for listener in listeners:
        listener.state.observed.set_record(listener.marks[..., None])


def _twin(layer: Any) -> Any:
    """Copy a layer, tensors with a gradient included, which `deepcopy` alone refuses."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from tensors(part)

    return copy.deepcopy(layer, {id(t): t.detach().clone() for t in tensors(vars(layer))})


class Text:
    """The tail tokens of a cache, to be repeated as `how` says; `state`: a layer that has them."""

    def __init__(self, cache: PagedCache, how: Any, state: LayerState) -> None:
        assert cache.log.ids is not None, "refused when they were read"
        self.cache, self.how = cache, how
        length, first = state.tail.length, state.first_in_tail
        self.ids = cache.log.ids[:, first : state.num_seen].long()
        visible = visible_columns(state.mask, length)
        if visible is None:
            visible = torch.ones(1, length, dtype=torch.bool)
        visible = visible.cpu().expand(state.tail.batch, -1)
        columns = [row.nonzero().flatten() for row in visible]
        self.parts = [row.split(how.chunk_size) for row in columns]
        # A row's first tokens are in the tail only if none of its tokens has left the tail.
        self.sinks = [
            row[: 0 if departed else how.sinks]
            for row, departed in zip(columns, state.num_departed, strict=True)
        ]
        sealed = cache.padding.visible(state.tail.batch)
        self.mask = torch.cat([sealed, visible], dim=1).long()
        self.chunks = max(map(len, self.parts))

    def chunk(self, number: int) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor]]:
        """Return of each row: columns of chunk `number`, earlier sinks, number of ids, ids to read.

        A row without such a chunk reads nothing.
        """
        columns, sinks, lengths, given = [], [], [], []
        for row, parts in enumerate(self.parts):
            chunk = parts[number] if number < len(parts) else torch.arange(0)
            new_ids = torch.arange(0)
            if len(chunk):
                before = parts[number - 1] if number else torch.arange(0)
                text = torch.cat([before[max(len(before) - self.how.overlap, 0) :], chunk])
                prompt = torch.tensor(self.how.prompt_ids, dtype=torch.int64)
                new_ids = torch.cat([prompt, self.ids[row].cpu()[text]])
            columns.append(chunk)
            sinks.append(self.sinks[row][self.sinks[row] < chunk[0]] if len(chunk) else chunk)
            lengths.append(len(new_ids))
            given.append(new_ids)
        return columns, sinks, lengths, given

    def read(self, lengths: list[int], given: list[Tensor]) -> None:
        """Let the decoder read `given`, padded at the end, where no token sees the padding."""
        # A single token would count as generated and release a prompt that is held.
        width = max(2, *lengths)
        ids = torch.zeros(len(given), width, dtype=torch.int64)
        for row, new_ids in enumerate(given):
            ids[row, : len(new_ids)] = new_ids
        positions = self.mask.sum(-1, keepdim=True) + torch.arange(width)
        assert self.cache.binding is not None, "a cache reads what its model reads"
        decoder: Any = self.cache.binding.decoder()
        device = self.ids.device
        decoder(
            input_ids=ids.to(device),
            attention_mask=torch.cat([self.mask, torch.ones_like(ids)], dim=1).to(device),
            position_ids=positions.to(device),
            use_cache=True,
            **with_cache(self.cache),
        )
