"""Pages without a model around them: sealed from given tokens, counted, attended to."""

import torch
from pikv_kernels import merge_partial
from torch import Tensor

from pikv_hf.compressors import Compressor
from pikv_hf.storage.page_table import PageTable
from pikv_hf.storage.ragged_pages import RaggedPages
from pikv_hf.storage.token_table import TokenTable


def seal(
    compressor: Compressor, page_size: int, keys: Tensor, values: Tensor, queries: Tensor
) -> PageTable:
    """Pages of `keys` and `values` [1, H, T, D], by a layer that has seen `queries` [1, H, Q, D]."""
    table = PageTable(compressor, page_size)
    positions = torch.arange(keys.shape[2])[None, None]
    span = TokenTable({"keys": keys, "values": values, "positions": positions})
    table.append(span, [0], 1, queries if compressor.observed_queries else None)
    return table


def encoded_bytes(table: PageTable) -> float:
    """Bytes of a page's encoding, in the mean; positions and owners are not counted."""
    total = 0.0
    for slab in table.slabs:
        first = next(iter(slab.fields.values()))
        # Slabs have fields [R, H, S, ...], pools [N, ...], both with room for more pages.
        room = len(first) if isinstance(slab, RaggedPages) else first.shape[:3].numel()
        total += sum(t.nbytes for t in slab.fields.values()) * slab.page_count / room
    return total / sum(slab.page_count for slab in table.slabs)


def attention(table: PageTable, query: Tensor, scale: float) -> Tensor:
    """Of `query` [1, H, Q, D] over all pages."""
    parts = (part for slab in table.slabs for part in slab.attend(query, scale))
    out, lse = next(parts)
    for part in parts:
        out, lse = merge_partial(out, lse, *part)
    return out
