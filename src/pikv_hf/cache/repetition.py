"""The model repeats what a cache holds back, which marks each token with the attention it gets.

Shapes: B rows, H KV heads, G query heads of each, q new tokens, n open ones, S keys.
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

# The mark of a token that is not repeated is 0.
LEAST = torch.finfo(torch.float32).tiny


def check_repetition(how: Any, model: PreTrainedModel, native: type | None) -> None:
    """Refuse a scheduler that has `model` repeat texts as `how` says, if it cannot; None = it does not.

    Raises:
        ValueError: it cannot take a repetition back, or the prompt is not of its vocabulary.
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
    """Refuse to read `length` tokens that could not be repeated, with a scheduler that repeats.

    Behind a text, others may be read that are not repeated: questions about it.

    Raises:
        ValueError: the first text is not held back, or ids are unknown.
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
    """Stands in for what a layer observes while `columns[r]` of its tail are repeated in row r.

    `lengths[r]` of the new tokens are the repetition, `sinks[r]` columns are read beside it. `marks`
    [B, H, n]: the largest attention that each open token got.
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
        """The next forward pass repeats these columns of each row."""
        self.columns, self.sinks, self.lengths = columns, sinks, lengths

    def append(self, queries: Tensor, visible: Tensor | None) -> None:
        """`queries` [B, H, G, q, D] of new tokens: nothing is kept of them."""
        opened = self.state.tail.view()[0]
        before = opened.shape[2] - queries.shape[3]
        for row, (columns, sinks) in enumerate(zip(self.columns, self.sinks, strict=True)):
            count = self.lengths[row]
            if count:
                read = torch.cat([sinks, columns, torch.arange(before, before + count)])
                keys = opened[row][:, read.to(opened.device)]
                most = largest(queries[row, :, :, :count], keys, self.state.scale)
                found = most[:, len(sinks) : len(sinks) + len(columns)].clamp_min(LEAST)
                self.marks[row][:, columns.to(opened.device)] = found

    def truncate(self, removed: int, opened: int) -> None:
        """Nothing is kept of the tokens that are taken back."""


def largest(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The largest attention [H, S] that any of `queries` [H, G, q, D] pays each of `keys` [H, S, D].

    The newest q keys are those of the queries, causal. Products are as those of `attention_weights`.
    """
    asked = queries.shape[2]
    newest = torch.arange(asked, device=queries.device)[None, None]
    most = torch.zeros(keys.shape[:2], dtype=torch.float32, device=queries.device)
    for weights, _ in attention_weights(queries[None], keys[None], newest, asked, scale):
        most = torch.maximum(most, weights[0].amax((1, 2)))
    return most


@torch.no_grad()
def repeat(cache: PagedCache) -> None:
    """Let the model repeat the open tokens of `cache`, if its scheduler wants their marks.

    The repetition is taken back: the cache is as it was, with the marks as records of its tokens.
    Nothing is repeated of a text whose last forward pass has failed.
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
                # What is not paged cannot take tokens back: a copy reads them.
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
    """A copy of a layer, tensors with a gradient included, which `deepcopy` alone refuses."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from tensors(part)

    return copy.deepcopy(layer, {id(t): t.detach().clone() for t in tensors(vars(layer))})


class Text:
    """The open tokens of a cache, to be read again as `how` says; `state` is of a layer that holds them."""

    def __init__(self, cache: PagedCache, how: Any, state: LayerState) -> None:
        assert cache.log.ids is not None, "refused when they were read"
        self.cache, self.how = cache, how
        opened, first = state.tail.length, state.first_in_tail
        self.ids = cache.log.ids[:, first : state.num_seen].long()
        visible = visible_columns(state.mask, opened)
        if visible is None:
            visible = torch.ones(1, opened, dtype=torch.bool)
        visible = visible.cpu().expand(state.tail.batch, -1)
        columns = [row.nonzero().flatten() for row in visible]
        self.parts = [row.split(how.chunk_size) for row in columns]
        # First tokens of the rows that have none behind them.
        self.sinks = [
            row[: 0 if left else how.sinks]
            for row, left in zip(columns, state.num_departed, strict=True)
        ]
        sealed = cache.padding.visible(state.tail.batch)
        self.mask = torch.cat([sealed, visible], dim=1).long()
        self.chunks = max(map(len, self.parts))

    def chunk(self, number: int) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor]]:
        """Chunk `number` of each row: its columns, those of sinks before it, length and ids to read.

        A row that has no such chunk reads nothing.
        """
        columns, sinks, lengths, given = [], [], [], []
        for row, parts in enumerate(self.parts):
            mine = parts[number] if number < len(parts) else torch.arange(0)
            asked = torch.arange(0)
            if len(mine):
                before = parts[number - 1] if number else torch.arange(0)
                text = torch.cat([before[max(len(before) - self.how.overlap, 0) :], mine])
                prompt = torch.tensor(self.how.prompt_ids, dtype=torch.int64)
                asked = torch.cat([prompt, self.ids[row].cpu()[text]])
            columns.append(mine)
            sinks.append(self.sinks[row][self.sinks[row] < mine[0]] if len(mine) else mine)
            lengths.append(len(asked))
            given.append(asked)
        return columns, sinks, lengths, given

    def read(self, lengths: list[int], given: list[Tensor]) -> None:
        """The decoder reads `given`, padded at the end, where no token sees it."""
        # One new token would end a prompt that is held back.
        width = max(2, *lengths)
        ids = torch.zeros(len(given), width, dtype=torch.int64)
        for row, asked in enumerate(given):
            ids[row, : len(asked)] = asked
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
