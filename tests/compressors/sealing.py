"""A DynamicCache that encodes and decodes its tokens as pages would be: the oracle of models."""

import torch
from helpers import SMALL, dynamic, paged
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from pikv_hf import PiKVCache
from pikv_hf.compressors import Compressor, MixedCompressor
from pikv_hf.storage.codec import encoded
from pikv_hf.storage.page_table import PageTable
from pikv_hf.storage.room import NO_ROOM


class Asked:
    """The queries that the layers of a cache gave its pages, in turn: `PageTable.append` is watched.

    They are known by layer, batch row and the last column of the sealed tokens.
    """

    def __init__(self, monkeypatch) -> None:
        self.tables: dict[PageTable, dict[tuple[int, int], list[Tensor]]] = {}
        append = PageTable.append

        def watched(table, span, rows, batch, queries=None, room=NO_ROOM, lengths=None):
            if queries is not None:
                mine = self.tables.setdefault(table, {})
                columns = span["positions"].expand(len(rows), -1, -1)[:, 0]
                for number, row in enumerate(rows):
                    count = len(span) if lengths is None else lengths[number]
                    if count:
                        seals = mine.setdefault((row, int(columns[number, count - 1])), [])
                        seals.append(queries[number : number + 1])
            return append(table, span, rows, batch, queries, room, lengths)

        monkeypatch.setattr(PageTable, "append", watched)

    def of(self, cache: PiKVCache) -> dict[int, dict[tuple[int, int], list[Tensor]]]:
        return {
            layer.state.layer_idx: self.tables.get(layer.state.pages, {}) for layer in paged(cache)
        }


def decoded(compressor: Compressor, keys: Tensor, values: Tensor, queries: Tensor | None):
    """What pages [R, H, S, P, D] are after they were encoded, by members for a mixed compressor."""
    if not isinstance(compressor, MixedCompressor):
        return compressor.decode(encoded(compressor, keys, values, queries))
    choice = compressor.assign(keys, values, queries)[..., None, None]
    found = [decoded(member, keys, values, queries) for member in compressor.members]
    for number, (keys_, values_) in enumerate(found):
        keys = torch.where(choice == number, keys_, keys)
        values = torch.where(choice == number, values_, values)
    return keys, values


class Sealing(DynamicLayer):
    """A DynamicLayer that encodes and decodes what a page would hold when a layer seals it.

    `hidden` [B] are the left-padded columns of each row, which enter no page; `asked` the queries
    of each seal, by row and last column.
    """

    page_size, window = SMALL["page_size"], SMALL["window"]

    def __init__(self, compressor: Compressor, is_latent: bool, hidden: list[int], asked) -> None:
        super().__init__()
        self.compressor, self.is_latent, self.hidden = compressor, is_latent, hidden
        self.asked = asked
        self.ends = list(hidden)
        self.due = 0

    def update(self, key_states, value_states, *args, **kwargs):
        seen = super().update(key_states, value_states, *args, **kwargs)
        before = [tensor.clone() for tensor in seen]
        length = self.get_seq_length()
        if length >= self.due or key_states.shape[2] > 1:
            self.due = length + self.page_size
            ends = [
                end + max(length - self.window - end, 0) // self.page_size * self.page_size
                for end in self.ends
            ]
            for row in range(len(self.keys)):
                prompt = row * len(ends) // len(self.keys)  # beams of a prompt are side by side
                start, end = self.ends[prompt], ends[prompt]
                if start < end:
                    self._seal(row, start, end)
            self.ends = ends
        return tuple(before)

    def _seal(self, row: int, start: int, end: int) -> None:
        states_ = [t[row, :, start:end] for t in (self.keys, self.values)]
        if self.is_latent:
            states_ = [torch.cat(states_, dim=-1), states_[0][..., :0]]
        missing = -(end - start) % self.page_size
        pages = [
            torch.nn.functional.pad(t, (0, 0, 0, missing)).unflatten(1, (-1, self.page_size))
            for t in states_
        ]
        queries = self.asked[row, end - 1].pop(0) if self.compressor.observed_queries else None
        found = decoded(self.compressor, *(t[None] for t in pages), queries)
        states_ = [t[0].flatten(1, 2)[:, : end - start] for t in found]
        if self.is_latent:
            states_ = states_[0].split([self.keys.shape[-1], self.values.shape[-1]], dim=-1)
        self.keys[row, :, start:end], self.values[row, :, start:end] = states_

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.ends = [min(end, self.get_seq_length()) for end in self.ends]
        self.due = 0


def sealing(model, name: str, compressor: Compressor, lengths, asked):
    """A cache of the model whose pages are decoded at once; `asked` of one that ran before."""
    cache = dynamic(model)
    hidden = [max(lengths) - length for length in lengths]
    for idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            bound = compressor.bind(model.config, idx)
            is_latent = name == "deepseek_v3"
            cache.layers[idx] = Sealing(bound, is_latent, hidden, asked.get(idx, {}))
    return cache
