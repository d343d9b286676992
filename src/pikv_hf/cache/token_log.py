"""The token ids that a cache has seen, 4 bytes each, to tell a continuation from a new text."""

import torch
from torch import Tensor

from ..layer.settings import Settings
from ..storage.memory import is_writable

# Ids kept by a cache that evicts tokens: it may read an endless stream.
MAX_IDS = 4096


def num_kept_ids(settings: Settings) -> int | None:
    """Return about how many of the newest token ids a cache keeps; None = all."""
    keeps_all = settings.scheduler is None or settings.needs.repetition is not None
    return None if keeps_all else MAX_IDS


def log_bytes(rows: int, tokens: int, max_ids: int | None) -> int:
    """Return the maximum bytes of a log of `tokens` ids that keeps about `max_ids` (None = all)."""
    return 4 * rows * _room(tokens if max_ids is None else min(tokens, 2 * max_ids))


def _room(tokens: int) -> int:
    return tokens + tokens // 8 + 64


class TokenLog:
    """The ids of all cached tokens, or of about the newest `max_ids`; None once any id is unknown.

    Ids are unknown if the model is given `inputs_embeds`. `ids[:, i]` belongs to token `first + i`;
    columns from token `length` on are free.
    """

    def __init__(self, max_ids: int | None = None) -> None:
        self.max_ids = max_ids
        self.ids: Tensor | None = None
        self.first = self.length = 0
        self.is_complete = True

    def reset(self) -> None:
        """Forget all ids."""
        self.ids, self.first, self.length, self.is_complete = None, 0, 0, True

    def append(self, ids: Tensor | None) -> None:
        """Append new ids [B, q]; None if the model was given embeddings."""
        if ids is None or ids.dim() != 2 or not self.is_complete:
            self.is_complete, self.ids = False, None
            return
        if self.max_ids is not None and ids.shape[1] > self.max_ids:  # no older id is kept
            self.length += ids.shape[1] - self.max_ids
            self.ids, self.first, ids = None, self.length, ids[:, -self.max_ids :]
        end = self.length + ids.shape[1]
        if self.ids is None or end - self.first > self.ids.shape[1] or not is_writable(self.ids):
            self._move(ids)
        assert self.ids is not None, "there is room now"
        self.ids[:, self.length - self.first : end - self.first] = ids
        self.length = end

    def _move(self, new: Tensor) -> None:
        """Move to a buffer with room for the ids `new` and more, with at most `max_ids` old ids."""
        first = self.first if self.max_ids is None else max(self.first, self.length - self.max_ids)
        held, needed = self.length - first, self.length - first + new.shape[1]
        room = new.new_empty(new.shape[0], _room(needed), dtype=torch.int32)
        if self.ids is not None:
            room[:, :held] = self.ids[:, first - self.first : self.length - self.first]
        self.ids, self.first = room, first

    def starts(self, ids: Tensor) -> bool:
        """Return whether `ids` [B, n] begin with the cached ids, as far as they are known."""
        if self.ids is None:
            return True
        known = self.ids[:, : self.length - self.first]
        repeats = known.shape[0] // ids.shape[0]
        begin = ids[:, self.first : self.length].to(known.device)
        begin = begin.repeat_interleave(max(repeats, 1), dim=0)
        return begin.shape == known.shape and bool((begin == known).all())

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)
        self.first = min(self.first, self.length)

    def map_rows(self, index: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index.to(self.ids.device))
