"""The columns of the sequence that are tokens of a row; the others are padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.versions import full_attention_mask
from ..storage.memory import on_device


class Columns:
    """The tokens of each batch row among the columns of the sequence, as read from the masks.

    `hidden` [B, c] bool, on the CPU, is True at padding among the first c columns; later columns
    are tokens. None = there is no padding. The position of a token is the number of tokens of its
    row before it. `covered` [B, 1 or q, n] bool is True at tokens that have left the tail and that
    the newest mask hides from its queries; None = it hides none. The paged layers of a cache share
    the columns.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.covered: Tensor | None = None
        # Changes whenever `hidden` does, so that results derived from it can be kept.
        self.stamp = 0
        self._uploaded: tuple[int, torch.device, Tensor] | None = None

    def reset(self) -> None:
        """Forget all columns."""
        self._set(None)
        self.covered = None

    def note(self, visible: Tensor | None, start: int, end: int, starts: Sequence[int]) -> None:
        """Note which columns from `start` to `end` are tokens: all, or `visible` [B or 1, n].

        Columns of row r before `starts[r]` have left its tail and do not change.
        """
        if self.hidden is None and (visible is None or visible.all()):
            return
        held = self._hidden(len(starts), start, end)
        new = torch.zeros_like(held) if visible is None else ~visible.cpu()
        departed = torch.arange(start, end) < torch.tensor(starts)[:, None]
        new = torch.where(departed, held, new)
        if not torch.equal(new, held):
            self._set(torch.cat([self._hidden(len(starts), 0, start), new], dim=1))

    def _set(self, hidden: Tensor | None) -> None:
        self.stamp += 1
        if hidden is not None:
            end = hidden.any(0).nonzero().flatten()
            hidden = hidden[:, : int(end[-1]) + 1].clone() if len(end) else None
        self.hidden = hidden

    def tensors(self) -> Iterator[Tensor]:
        uploaded = None if self._uploaded is None else self._uploaded[2]
        yield from (t for t in (self.hidden, self.covered, uploaded) if t is not None)

    def crop(self, length: int) -> None:
        if self.hidden is not None:
            self._set(self.hidden[:, :length])
        if self.covered is not None:
            self.covered = self.covered[..., :length].clone()

    def map_rows(self, index: Tensor) -> None:
        if self.hidden is not None:
            self._set(self.hidden.index_select(0, index.cpu()))
        if self.covered is not None:
            self.covered = self.covered.index_select(0, index.to(self.covered.device))

    def visible(self, start: int, end: int) -> Tensor | None:
        """Return [B, end - start] bool, True where a column is a token; None = everywhere."""
        if self.hidden is None or self.hidden.shape[1] <= start:
            return None
        hidden = self.hidden[:, start:end]
        return ~F.pad(hidden, (0, end - start - hidden.shape[1]))

    def _hidden(self, rows: int, start: int, end: int) -> Tensor:
        """Return [rows, end - start] bool, True at padding."""
        visible = self.visible(start, end)
        if visible is None:
            return torch.zeros(rows, end - start, dtype=torch.bool)
        return ~visible

    def counts(self, ends: Sequence[int]) -> list[int]:
        """Return the number of tokens of each row before the columns `ends`."""
        if self.hidden is None:
            return list(ends)
        before = self._before()
        last = before.shape[1] - 1
        at = torch.tensor(ends)
        padding = before.gather(1, (at - 1).clamp(0, last)[:, None])[:, 0].long()
        return (at - padding.masked_fill(at == 0, 0)).tolist()

    def numbered(self, rows: list[int], columns: Tensor) -> Tensor:
        """Return the positions of tokens of `rows` at `columns` [R or 1, ...]."""
        if self.hidden is None:
            return columns
        before = self._before_on(columns.device).index_select(
            0, on_device(tuple(rows), columns.device)
        )
        at = columns.clamp(0, before.shape[1] - 1).long()
        at = at.expand(len(rows), *at.shape[1:])
        return columns - before.gather(1, at.flatten(1)).view(at.shape)

    def _before_on(self, device: torch.device) -> Tensor:
        """Return `_before` on `device`, uploaded once until `hidden` changes."""
        if device.type == "cpu":
            return self._before()
        if self._uploaded is None or self._uploaded[:2] != (self.stamp, device):
            self._uploaded = self.stamp, device, self._before().to(device)
        return self._uploaded[2]

    def _before(self) -> Tensor:
        """Return the number [B, c] of padding columns up to each column, itself included."""
        assert self.hidden is not None, "there is padding"
        return self.hidden.cumsum(1, dtype=torch.int32)

    def differences(
        self, mask: Any, total: int, starts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Compare `mask`, of `total` columns, with the columns before `starts[r]` of each row r.

        These columns have left the tail. The comparison does not wait for a device.

        Returns:
            Three bool tensors: [B, n], padding that the mask shows; [B, 1 or q, n], tokens that it
            hides from a query; [B, 1 or q, n], tokens to whose scores it adds another number. None
            if no column has left the tail, or the mask is for the tail alone.
        """
        length, rows = max(starts, default=0), len(starts)
        if not length:
            return None
        departed = torch.arange(length) < torch.tensor(starts)[:, None]
        padding = self._hidden(rows, 0, length)
        if mask is None:
            none = torch.zeros(rows, 1, length, dtype=torch.bool)
            return padding & departed, none, none
        mask = full_attention_mask(mask)
        if mask is None or (mask.dim() == 4 and mask.shape[-1] != total):
            return None  # made by the model's code for the tail alone
        mask = mask[..., :length]
        if mask.dim() == 2:  # columns that it lacks are hidden
            mask = F.pad(mask.bool(), (0, length - mask.shape[1]))[:, None, None]
        mask, is_added = mask.flatten(1, 2), mask.is_floating_point()
        shows = mask > torch.finfo(mask.dtype).min / 2 if is_added else mask.bool()
        changes = shows & (mask != 0) if is_added else torch.zeros_like(shows)
        padding, departed = padding.to(mask.device), departed.to(mask.device)
        tokens = (departed & ~padding)[:, None]
        return shows.any(1) & padding & departed, ~shows & tokens, changes & tokens

    def cover(self, covered: Tensor | None) -> None:
        """Hide tokens that have left the tail from the next queries: set `covered`."""
        self.covered = covered

    def refuse(self, shown: Tensor, changed: Tensor) -> None:
        """Raise ValueError for the first `changed` token, else for the first `shown` padding."""
        for row, _, column in changed.nonzero()[:1].tolist():
            raise ValueError(
                f"`attention_mask` adds to the scores of token {column} of row {row}, which is sealed "
                "into a page: there a token can be hidden or shown only, by the dtype's minimum or 0."
            )
        row, column = shown.nonzero()[0].tolist()
        raise ValueError(
            f"`attention_mask` shows token {column} of row {row}, which an earlier mask hid as padding, "
            "so that it is no longer held: hide it as before, or call `cache.reset()` and pass the "
            "full token ids with this mask."
        )
