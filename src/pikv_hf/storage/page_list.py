"""The pages of each KV head of a store, for routers.

Shapes: R stored rows, H KV heads, S new pages of P tokens, M pages of the fullest head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import PageCodec
from .cutting import paged
from .token_table import TokenTable

# Returns what a router reads of pages: tensors [R or 1, H or 1, S, ...] by name, of decoded keys
# [R, H, S, P, Dk] and other data of their tokens, [R or 1, H or 1, S, P, ...] by name.
Digest = Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]]

# Numbers of keys that are decoded at a time.
MAX_DECODED = 2**22


@dataclass(frozen=True)
class PageList:
    """The pages of each KV head of a store, the oldest first.

    `digests` [R or 1, H or 1, M, ...] is what a router reads of the pages, and `first`
    [R or 1, H or 1, M] the column of the first token of each. Its first `tokens` [R, H or 1, M] tokens
    are valid; 0 = the head has no such page. `full` and `partial` [R, H], on the CPU, count the full
    pages and the other pages of each head.
    """

    digests: TokenTable
    first: Tensor
    tokens: Tensor
    full: Tensor
    partial: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.digests.tensors.values(), self.first, self.tokens)


def digested(
    digest: Digest | None, codec: PageCodec, fields: dict[str, Tensor], known: TokenTable, size: int
) -> TokenTable:
    """Return the digests [R or 1, H or 1, S, ...] of encoded pages [R, H, S, ...] of `size` tokens.

    `known` [R or 1, H or 1, T, ...] is other data of their tokens. They are empty without `digest`.
    """
    if digest is None:
        return TokenTable({})
    data = {name: paged(tensor, size) for name, tensor in known.tensors.items()}
    rows, heads, pages = next(iter(fields.values())).shape[:3]
    step, parts, start = 1, [], 0
    while start < pages:
        portion = {name: tensor[:, :, start : start + step] for name, tensor in fields.items()}
        keys = codec.decode_keys(portion)
        portion = {name: tensor[:, :, start : start + step] for name, tensor in data.items()}
        parts.append(digest(keys, portion))
        start += step
        step = max(MAX_DECODED // (rows * heads * size * max(keys.shape[-1], 1)), 1)
    return TokenTable({name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]})
