"""Attention over selected pages of a store.

Shapes: n readers, H KV heads, Q queries of each, K pages of each, P tokens a page.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pikv_kernels import lowest_score, new_mask
from torch import Tensor

from .codec import attend_masked, cover
from .ragged_pages import RaggedPages
from .row_map import Partial
from .uniform_pages import UniformPages

# Bytes of pages that a CPU copies at a time, if there are more than twice as many: they stay in its
# cache, and in memory that was used before, as memory for all selected pages would not.
MAX_COPIED = 2**21


@dataclass(frozen=True)
class Selection:
    """A work list: which pages of a store are read.

    `index` [n, H, K] are indices in `PageList` of pages of the stored `rows` [n]; None = of all stored
    rows in order. Of each page the first `tokens` [n, H, K] tokens are read; 0 = the place is empty,
    and any page may be named there. None = all pages are full.
    """

    store: UniformPages | RaggedPages
    rows: Tensor | None
    index: Tensor
    tokens: Tensor | None

    @classmethod
    def of_row(cls, store: UniformPages | RaggedPages, row: int) -> "Selection":
        """Select all pages of one stored row."""
        held, heads = store.page_list(), store.held().shape[1]
        tokens = held.tokens[row : row + 1].expand(1, heads, -1)
        index = torch.arange(tokens.shape[2], device=tokens.device).expand_as(tokens)
        return cls(store, torch.tensor([row], device=tokens.device), index, tokens)

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of one encoded page of a KV head."""
        return self.store.page_bytes

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return the columns [n, H, K, P] of the tokens, and True at those that are read."""
        columns = self.store.columns_at(self.index, self.rows)
        if self.tokens is None:
            return columns, torch.ones_like(columns, dtype=torch.bool)
        place = torch.arange(columns.shape[3], device=columns.device)
        return columns, place < self.tokens[..., None]

    def attend(self, query: Tensor, scale: float, covered: Tensor | None) -> Iterator[Partial]:
        """Yield outputs [n, H, Q, Dv] and log-sum-exps [n, H, Q] of `query` [n, H, Q, Dk].

        `covered` [n, Q, columns] bool is True at columns that a query may not see; None = it sees
        all.
        """
        store, size = self.store, self.store.page_size
        codec, tier = store.codec, store.tier
        owners = query.shape[0] * query.shape[1]
        max_pages = tier.max_pages(self.page_bytes)
        if tier.device.type == "cpu" and self.index.numel() * self.page_bytes > 2 * MAX_COPIED:
            max_pages = min(max_pages, MAX_COPIED // self.page_bytes)
        step = max(codec.tokens_per_block(owners, tier.device) // size, 1)
        step = min(step, max(max_pages // owners, 1))
        for start in range(0, self.index.shape[2], step):
            index = self.index[:, :, start : start + step]
            fields = tier.bring(store.pages_at(index, self.rows))
            tokens = index.shape[2] * size
            if self.tokens is None and covered is None:
                yield codec.attend(query, fields, tokens, scale)
                continue
            mask = new_mask(query, *index.shape[:2], tokens)[:, :, None]
            if self.tokens is not None:
                held = self.tokens[:, :, start : start + step, None].to(query.device)
                is_behind = torch.arange(size, device=held.device) >= held
                mask.masked_fill_(is_behind.flatten(2)[:, :, None], lowest_score(query.dtype))
            if covered is not None:
                columns = store.columns_at(index, self.rows).to(query.device)
                mask = cover(mask, columns.flatten(2), covered)
            yield attend_masked(codec, query, fields, tokens, scale, mask)
