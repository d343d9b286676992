"""Padding among the tokens that have left the tail, which later masks must hide as well."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.versions import full_attention_mask

_INSTEAD = "call `cache.reset()` and pass the full token ids with this mask"


class Padding:
    """The columns of the sequence that were hidden when they left the tail, and so are in no page.

    The first `length` columns have left the tail. `hidden` [B, c] is True where one of the first c
    was hidden; all others were visible. None = all were. The paged layers of a cache share it.
    """

    def __init__(self) -> None:
        self.length = 0
        self.hidden: Tensor | None = None

    def reset(self) -> None:
        """Forget all columns."""
        self.length, self.hidden = 0, None

    def append(self, start: int, visible: Tensor | None, count: int) -> None:
        """Add `count` columns from `start` on, unless known; `visible` [B, count], None = all."""
        if start < self.length:
            return
        self.length = start + count
        if visible is None or visible.all():
            return
        held = (
            torch.zeros(len(visible), 0, dtype=torch.bool) if self.hidden is None else self.hidden
        )
        unpadded = held.new_zeros(len(visible), start - held.shape[1])
        self._set(torch.cat([held, unpadded, ~visible], dim=1))

    def _set(self, hidden: Tensor) -> None:
        end = hidden.any(0).nonzero().flatten()
        self.hidden = hidden[:, : int(end[-1]) + 1].clone() if len(end) else None

    def tensors(self) -> Iterator[Tensor]:
        if self.hidden is not None:
            yield self.hidden

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)
        if self.hidden is not None:
            self._set(self.hidden[:, : self.length])

    def map_rows(self, index: Tensor) -> None:
        if self.hidden is not None:
            self._set(self.hidden.index_select(0, index.cpu()))

    def visible(self, rows: int) -> Tensor:
        """Return [rows, length] bool, True for columns whose tokens were sealed or evicted."""
        shown = torch.ones(rows, self.length, dtype=torch.bool)
        if self.hidden is not None:
            shown[:, : self.hidden.shape[1]] = ~self.hidden
        return shown

    def changed(self, mask: Any, total: int) -> Tensor | None:
        """Return [B, n] bool, True where `mask` for `total` columns differs from earlier masks.

        None if there is nothing to compare. Does not wait for a device.
        """
        if mask is None:
            return self.hidden
        mask = full_attention_mask(mask) if self.length else None
        if mask is None or (mask.dim() == 4 and mask.shape[-1] != total):
            return None  # made by the model's own code, for the tail alone
        mask = mask[..., : self.length]
        if mask.dim() == 4:
            shows = (mask == 0 if mask.is_floating_point() else mask.bool()).flatten(1, 2)
            shows, hides = shows.any(1), ~shows.all(1)
        else:
            shows = F.pad(
                mask.bool(), (0, self.length - mask.shape[1])
            )  # what is missing is hidden
            hides = ~shows
        if self.hidden is None:
            return hides
        hidden = self.hidden.to(mask.device)
        first, end = hides[:, : hidden.shape[1]], hides[:, hidden.shape[1] :]
        first = torch.where(hidden, shows[:, : hidden.shape[1]], first)
        return torch.cat([first, end.expand(len(first), -1)], dim=1)

    def refuse(self, changed: Tensor, seen: int) -> None:
        """Raise ValueError for the first column that is `changed`, in a cache of `seen` tokens."""
        row, column = changed.nonzero()[0].tolist()
        was_hidden = (
            self.hidden is not None and self.hidden[row : row + 1, column : column + 1].any()
        )
        if was_hidden:
            raise ValueError(
                f"`attention_mask` shows token {column} of row {row}, which an earlier mask hid as "
                f"padding, so that it is no longer held: hide it as before, or {_INSTEAD}."
            )
        raise ValueError(
            f"`attention_mask` hides token {column} of row {row}, which is sealed into a page, where "
            f"none can be hidden: show it as before, {_INSTEAD}, or make the cache with a `window` of "
            f"{seen - column} tokens or more, which stay open."
        )
