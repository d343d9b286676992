"""The text that the model repeats, chunk by chunk."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layer.departure import open_places
from ...layer.state import LayerState
from ...model.versions import with_cache
from ..paged_cache import PagedCache


class Part(NamedTuple):
    """Columns of a row's tail, the earlier sinks that they also read, and the ids to read."""

    columns: Tensor
    sinks: Tensor
    ids: Tensor


class Text:
    """The tail tokens of a cache, to be repeated as `how` says; `state`: a layer that has them."""

    def __init__(self, cache: PagedCache, how: Any, state: LayerState) -> None:
        assert cache.log.ids is not None, "tokens without ids are refused"
        self.cache, self.how = cache, how
        first, batch = state.first_in_tail, state.tail.batch
        self.ids = cache.log.ids[:, first : state.num_seen].long()
        visible = cache.columns.visible(0, state.num_seen)
        if visible is None:
            visible = torch.ones(1, state.num_seen, dtype=torch.bool)
        self.mask = visible.expand(batch, -1).long()
        is_open = open_places(state)
        if is_open is None:
            is_open = torch.ones(batch, state.tail.length, dtype=torch.bool)
        columns = [row.nonzero().flatten() for row in is_open]
        self.parts = [row.split(how.chunk_size) for row in columns]
        # A row's first tokens are in the tail only if none of its tokens has left the tail.
        self.sinks = [
            row[: 0 if departed else how.sinks]
            for row, departed in zip(columns, state.num_departed, strict=True)
        ]
        self.chunks = max(map(len, self.parts))

    def chunk(self, number: int) -> list[Part]:
        """Return the part of each row in chunk `number`, empty if the row has no such chunk."""
        found = []
        for row, parts in enumerate(self.parts):
            chunk = parts[number] if number < len(parts) else torch.arange(0)
            if not len(chunk):
                found.append(Part(chunk, chunk, chunk))
                continue
            before = parts[number - 1] if number else torch.arange(0)
            text = torch.cat([before[max(len(before) - self.how.overlap, 0) :], chunk])
            prompt = torch.tensor(self.how.prompt_ids, dtype=torch.int64)
            ids = torch.cat([prompt, self.ids[row].cpu()[text]])
            found.append(Part(chunk, self.sinks[row][self.sinks[row] < chunk[0]], ids))
        return found

    def read(self, parts: list[Part]) -> None:
        """Let the decoder read `parts`, padded at the end, so that no token sees padding."""
        # A single token would count as generated and release a prompt that is held.
        width = max(2, *(len(part.ids) for part in parts))
        ids = torch.zeros(len(parts), width, dtype=torch.int64)
        for row, part in enumerate(parts):
            ids[row, : len(part.ids)] = part.ids
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
