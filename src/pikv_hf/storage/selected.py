"""Attention over selected pages of a store.

Shapes: n readers, H KV heads, Q queries of each, K pages of each, P tokens a page.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pikv_kernels import lowest_score, new_mask
from torch import Tensor

from .codec import attend_masked, cover
from .memory import empty_like
from .ragged_pages import RaggedPages
from .row_map import Partial
from .uniform_pages import UniformPages


@dataclass(frozen=True)
class Selection:
    """A work list: which pages of a store are read.

    `places` [n, H, K] are numbers of pages in the store, as in `PageList.places`. Of each page the
    first `tokens` [n, H, K] tokens are read; 0 = the place is empty, and any page may be named there.
    None = all pages are full.
    """

    store: UniformPages | RaggedPages
    places: Tensor
    tokens: Tensor | None

    def attend(self, query: Tensor, scale: float, covered: Tensor | None) -> Iterator[Partial]:
        """Yield outputs [n, H, Q, Dv] and log-sum-exps [n, H, Q] of `query` [n, H, Q, Dk].

        `covered` [n, Q, columns] bool is True at columns that a query may not see; None = it sees
        all.
        """
        store, size = self.store, self.store.page_size
        codec, tier = store.codec, store.tier
        owners = query.shape[0] * query.shape[1]
        step = max(codec.tokens_per_block(owners, tier.device) // size, 1)
        step = min(step, max(tier.max_pages(store.page_bytes) // owners, 1))
        for start in range(0, self.places.shape[2], step):
            places = self.places[:, :, start : start + step]
            fields = tier.bring({k: taken(t, places) for k, t in store.flat_fields().items()})
            tokens = places.shape[2] * size
            if self.tokens is None and covered is None:
                yield codec.attend(query, fields, tokens, scale)
                continue
            mask = new_mask(query, *places.shape[:2], tokens)[:, :, None]
            if self.tokens is not None:
                held = self.tokens[:, :, start : start + step, None]
                is_behind = torch.arange(size, device=held.device) >= held
                mask.masked_fill_(is_behind.flatten(2)[:, :, None], lowest_score(query.dtype))
            if covered is not None:
                mask = cover(mask, store.columns(places).flatten(2), covered)
            yield attend_masked(codec, query, fields, tokens, scale, mask)


def taken(pages: Tensor, places: Tensor) -> Tensor:
    """Gather the pages `places` [n, H, K] of `pages` [N, ...], in the memory of `pages`."""
    index = places.flatten().to(pages.device)
    if pages.device.type != "cpu":
        return pages.index_select(0, index).unflatten(0, places.shape)
    out = empty_like(pages, (index.numel(), *pages.shape[1:]))
    return torch.index_select(pages, 0, index, out=out).unflatten(0, places.shape)
