"""The interface through which storage encodes and reads pages.

Shapes: R rows, H KV heads, S pages of P tokens, s of them read at a time, Q queries; Dk and Dv are
the key and value dims, of which either may be 0.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from pikv_kernels import lowest_score, partial_attention, weighted_attention
from torch import Tensor

# Maximum number of queries of a KV head for which attention weights are computed: the weights of
# more queries would be larger than the pages.
MAX_WEIGHTED = 64
# Tokens that an accelerator decodes at a time, of all rows and KV heads.
BLOCK_ON_ACCELERATORS = 2**18


class PageCodec(ABC):
    """An encoding of pages: they are encoded once, when sealed, and decoded when read.

    For pages that are sealed together, storage calls `assign` once, then `encode` or
    `encode_observed` of the members. To read pages it calls `attend`, `attend_weighted`, `decode`
    or `decode_keys`. No method changes its arguments.
    """

    #: Tokens of a row and KV head that attention decodes at a time on a CPU; None = pages are read
    #: in place.
    block_tokens: ClassVar[int | None] = 2048

    #: True if attention may use `attend_weighted`; else neither it nor `into_pages` is called.
    gives_weights: ClassVar[bool] = False

    #: Number of newest tokens whose queries `encode_observed` is given; 0 = none.
    observed_queries: ClassVar[int] = 0

    #: True if decoding always restores the original pages, NaN and infinities included.
    is_lossless: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The name of the codec in messages."""
        return type(self).__name__.lower()

    @property
    def is_per_token(self) -> bool:
        """True if each token is encoded by itself: all fields are [R, H, S, P, ...].

        Such tokens keep their codes when they move to other pages.
        """
        return False

    @property
    def members(self) -> "tuple[PageCodec, ...]":
        """The codecs that a page may be encoded by; a plain codec has only itself."""
        return (self,)

    @property
    def is_mixed(self) -> bool:
        """True if pages have different encodings, which `assign` chooses."""
        return self.members != (self,)

    def assign(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor | None:
        """Return the index in `members` of each page's codec, int64 [R, H, S]; None = not mixed.

        `keys` is [R, H, S, P, Dk], `values` [R, H, S, P, Dv] and `queries` [R, H, Q, Dk], as in
        `encode_observed`, or None before any query was seen.
        """
        return None

    def of_head(self, head: int) -> "PageCodec":
        """Return the codec of one KV head: `self`, unless heads are encoded differently.

        Ragged pages of heads with different codecs are stored in separate pools.
        """
        return self

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors held for the layer, which count as bytes of the cache."""
        return iter(())

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Encode `keys` [R, H, S, P, Dk], `values` [R, H, S, P, Dv] to tensors [R, H, S, ...]."""

    def encode_observed(self, keys: Tensor, values: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Encode as `encode` does, but use the newest `queries` [R, H, Q, Dk] of the layer.

        The Q queries are of all query heads of a KV head, and scaled: their products with keys are
        the logits of attention. Queries of padding are zeros. Storage calls this method instead of
        `encode` if `observed_queries` is not 0 and queries were seen.
        """
        return self.encode(keys, values)

    @abstractmethod
    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode pages to keys [R, H, S, P, Dk] and values [R, H, S, P, Dv]."""

    def decode_keys(self, fields: dict[str, Tensor]) -> Tensor:
        """Decode the keys [R, H, S, P, Dk] alone. Override it if decoding values costs extra."""
        return self.decode(fields)[0]

    def tokens_per_block(self, owners: int, device: torch.device) -> int:
        """Return how many tokens of each of `owners` rows and KV heads are decoded at a time."""
        if self.block_tokens is None:
            return sys.maxsize
        if device.type == "cpu":
            return self.block_tokens
        return max(self.block_tokens, BLOCK_ON_ACCELERATORS // owners)

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend with `query` [R, H, Q, Dk] to the first `tokens` tokens of pages [R, H, s, ...].

        Returns `[R, H, Q, Dv]` and the log-sum-exp `[R, H, Q]`. Keys without values (Dv = 0) are
        latents, which are their own values. Override it if the encoding can be read directly.
        """
        keys, values = (flat_tokens(pages, tokens) for pages in self.decode(fields))
        return attend_states(query, keys, values, None, scale)

    def attend_weighted(
        self,
        query: Tensor,
        fields: dict[str, Tensor],
        tokens: int,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend with a few queries; return also the weights [R, H, Q, tokens], float32, of sum 1.

        The caller passes the queries through `into_pages` before and the output through
        `out_of_pages` after. `mask` is added to the scores, as in `partial_attention`.
        """
        keys, values = (flat_tokens(pages, tokens) for pages in self.decode(fields))
        return weighted_states(query, keys, values, mask, scale)

    def into_pages(self, query: Tensor, fields: dict[str, Tensor]) -> Tensor:
        """Transform (for instance rotate) `query` as the encoded keys are, once for all pages."""
        return query

    def out_of_pages(self, out: Tensor) -> Tensor:
        """Transform the output of attention over pages back to the basis of the model."""
        return out


def attend_masked(
    codec: PageCodec,
    query: Tensor,
    fields: dict[str, Tensor],
    tokens: int,
    scale: float,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend as `PageCodec.attend` does, with an additive `mask` for `partial_attention`."""
    # Over pages that are read in place, one fused kernel is faster than several operations.
    if codec.gives_weights and codec.block_tokens is not None and query.shape[2] <= MAX_WEIGHTED:
        turned = codec.into_pages(query, fields)
        out, lse, _ = codec.attend_weighted(turned, fields, tokens, scale, mask)
        return codec.out_of_pages(out), lse
    keys, values = (flat_tokens(pages, tokens) for pages in codec.decode(fields))
    return attend_states(query, keys, values, mask, scale)


def cover(mask: Tensor, columns: Tensor, covered: Tensor) -> Tensor:
    """Return `mask` [n, 1 or H, 1, T] as [n, h, Q, T] that also hides covered tokens.

    The mask is additive. The tokens are at `columns` [n, h, T], h = 1 or H; `covered` [n, Q, c] is
    True at columns that a query may not see.
    """
    # Places behind the last token of a head may have any column; `mask` hides them already.
    index = columns.to(covered.device).long()[:, :, None].clamp(0, covered.shape[2] - 1)
    index = index.expand(-1, -1, covered.shape[1], -1)
    is_hidden = covered[:, None].expand(-1, index.shape[1], -1, -1).gather(3, index)
    return mask.masked_fill(is_hidden.to(mask.device), lowest_score(mask.dtype))


def encoded(
    codec: PageCodec, keys: Tensor, values: Tensor, queries: Tensor | None
) -> dict[str, Tensor]:
    """Call `encode_observed` if the codec uses queries and there are any, else `encode`."""
    if queries is None or not codec.observed_queries:
        return codec.encode(keys, values)
    return codec.encode_observed(keys, values, queries)


def decoded(codec: PageCodec, fields: dict[str, Tensor], with_values: bool) -> dict[str, Tensor]:
    """Decode pages to `keys` and, if `with_values`, `values`."""
    if not with_values:
        return {"keys": codec.decode_keys(fields)}
    keys, values = codec.decode(fields)
    return {"keys": keys, "values": values}


def flat_tokens(pages: Tensor, tokens: int) -> Tensor:
    """Return the first `tokens` tokens [R, H, tokens, D] of pages [R, H, s, P, D]."""
    each = pages.flatten(2, 3)
    return each if each.shape[2] == tokens else each.narrow(2, 0, tokens)


def attend_states(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Call `partial_attention`; keys without values are latents, which are their own values."""
    return partial_attention(query, keys, values if values.shape[-1] else keys, mask, scale)


def weighted_states(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `weighted_attention`; keys without values are latents, which are their own values."""
    return weighted_attention(query, keys, values if values.shape[-1] else keys, mask, scale)
