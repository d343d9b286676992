"""Which token ids a cache has seen: 4 bytes a token, to tell a continuation from a new text."""

import torch
from torch import Tensor

from .memory import is_writable


class TokenLog:
    """The ids of all cached tokens, or nothing once any of them is unknown (`inputs_embeds`)."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.length = 0
        self.is_complete = True

    def append(self, ids: Tensor | None) -> None:
        """Note new ids [B, q]; None if the model was given embeddings."""
        if ids is None or ids.dim() != 2 or not self.is_complete:
            self.is_complete, self.ids = False, None
            return
        end = self.length + ids.shape[1]
        if self.ids is None or end > self.ids.shape[1] or not is_writable(self.ids):
            room = torch.empty(
                ids.shape[0], end + end // 8 + 64, dtype=torch.int32, device=ids.device
            )
            if self.ids is not None:
                room[:, : self.length] = self.ids[:, : self.length]
            self.ids = room
        self.ids[:, self.length : end] = ids
        self.length = end

    def starts(self, ids: Tensor) -> bool:
        """Whether `ids` [B, n] begin with the cached ones, as far as these are known."""
        if self.ids is None:
            return True
        known = self.ids[:, : self.length]
        repeats = known.shape[0] // ids.shape[0]
        begin = ids[:, : self.length].to(known.device).repeat_interleave(max(repeats, 1), dim=0)
        return begin.shape == known.shape and bool((begin == known).all())

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    def map_rows(self, index: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index.to(self.ids.device))
