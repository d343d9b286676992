"""Which token ids a cache has seen: 4 bytes a token, to tell a continuation from a new text."""

import torch
from torch import Tensor

from ..layer.settings import Settings
from ..storage.memory import is_writable

# Of a cache that drops tokens, and may read an endless stream.
MOST = 4096


def num_kept_ids(settings: Settings) -> int | None:
    """About how many of the newest token ids a cache keeps; None = all."""
    repeats = settings.scheduler is None or settings.needs.repetition is not None
    return None if repeats else MOST


def log_bytes(rows: int, tokens: int, most: int | None) -> int:
    """Bytes that the ids of `tokens` tokens take at most, if about `most` are kept (None = all)."""
    return 4 * rows * _room(tokens if most is None else min(tokens, 2 * most))


def _room(tokens: int) -> int:
    return tokens + tokens // 8 + 64


class TokenLog:
    """The ids of all cached tokens, or of about the newest `most`; nothing once any is unknown.

    They are unknown if the model is given `inputs_embeds`. `ids[:, i]` is token `first + i`, of which
    those before `length` are there.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.ids: Tensor | None = None
        self.first = self.length = 0
        self.is_complete = True

    def reset(self) -> None:
        """Forget all ids."""
        self.ids, self.first, self.length, self.is_complete = None, 0, 0, True

    def append(self, ids: Tensor | None) -> None:
        """Note new ids [B, q]; None if the model was given embeddings."""
        if ids is None or ids.dim() != 2 or not self.is_complete:
            self.is_complete, self.ids = False, None
            return
        if self.most is not None and ids.shape[1] > self.most:  # none of the older ones stays
            self.length += ids.shape[1] - self.most
            self.ids, self.first, ids = None, self.length, ids[:, -self.most :]
        end = self.length + ids.shape[1]
        if self.ids is None or end - self.first > self.ids.shape[1] or not is_writable(self.ids):
            self._move(ids)
        assert self.ids is not None, "there is room now"
        self.ids[:, self.length - self.first : end - self.first] = ids
        self.length = end

    def _move(self, new: Tensor) -> None:
        """To a buffer with room for the ids `new` and more, without the oldest if there are many."""
        first = self.first if self.most is None else max(self.first, self.length - self.most)
        held, needed = self.length - first, self.length - first + new.shape[1]
        room = new.new_empty(new.shape[0], _room(needed), dtype=torch.int32)
        if self.ids is not None:
            room[:, :held] = self.ids[:, first - self.first : self.length - self.first]
        self.ids, self.first = room, first

    def starts(self, ids: Tensor) -> bool:
        """Whether `ids` [B, n] begin with the cached ones, as far as these are known."""
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
