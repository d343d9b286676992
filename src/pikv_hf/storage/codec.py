"""What storage asks of an encoding of pages.

Shapes: R rows, H KV heads, S pages of P tokens, Q queries; Dk and Dv are the key and value dims,
either may be 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from pikv_kernels import partial_attention, weighted_attention
from torch import Tensor


class PageCodec(ABC):
    """Encodes pages once, when they are sealed, and decodes them block by block when they are read.

    For pages that are sealed together storage calls `assign` once; then `encode`, or
    `encode_observed`, of the members; and `attend`, `attend_weighted` or `decode` whenever pages are
    read. No call changes its arguments.
    """

    #: Tokens of one row and KV head that attention decodes at a time; None = pages are read in place.
    block_tokens: ClassVar[int | None] = 2048

    #: Whether attention may use `attend_weighted`; else `into_pages` is never called.
    gives_weights: ClassVar[bool] = False

    #: Queries of how many of a layer's newest tokens `encode_observed` is given; 0 = none.
    observed_queries: ClassVar[int] = 0

    #: Whether decoded pages are always the original ones, NaN and infinities included.
    is_lossless: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The name in messages."""
        return type(self).__name__.lower()

    @property
    def is_per_token(self) -> bool:
        """Whether every token is encoded by itself: all fields are [R, H, S, P, ...].

        Tokens that move to other pages then keep their codes.
        """
        return False

    @property
    def members(self) -> "tuple[PageCodec, ...]":
        """The encodings that a page may have; a plain codec has one, itself."""
        return (self,)

    @property
    def is_mixed(self) -> bool:
        """Whether pages have different encodings, which `assign` chooses."""
        return self.members != (self,)

    def assign(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor | None:
        """The member of each page, int64 [R, H, S], for `keys` [R, H, S, P, Dk] and `values`.

        `queries` [R, H, Q, Dk] as in `encode_observed`; None before any query was seen. Returns None
        if every page has the only encoding.
        """
        return None

    def of_head(self, head: int) -> "PageCodec":
        """The codec of one KV head of the layer, if heads are encoded differently; else itself.

        Ragged pages of such heads are stored apart.
        """
        return self

    def tensors(self) -> Iterator[Tensor]:
        """The tensors held for the layer: a part of the cache's bytes."""
        return iter(())

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Encode `keys` [R, H, S, P, Dk] and `values` [R, H, S, P, Dv] into tensors [R, H, S, ...]."""

    def encode_observed(self, keys: Tensor, values: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Encode as `encode` does, knowing the newest `queries` [R, H, Q, Dk] that the layer has asked.

        The queries of all query heads of a KV head stand side by side, scaled: their products with
        keys are the logits of attention. Zeros stand for padding. Called instead of `encode` if
        `observed_queries` asks for queries.
        """
        return self.encode(keys, values)

    @abstractmethod
    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys [R, H, S, P, Dk] and values [R, H, S, P, Dv] of encoded pages."""

    def decode_keys(self, fields: dict[str, Tensor]) -> Tensor:
        """The keys [R, H, S, P, Dk] alone. Override it where values cost a decoding of their own."""
        return self.decode(fields)[0]

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of `query` [R, H, Q, Dk] over the first `tokens` of pages [R, H, s, ...].

        Returns `[R, H, Q, Dv]` and the log-sum-exp `[R, H, Q]`. Keys without values (Dv = 0) are
        latents, their own values. Override it where the encoding can be read directly.
        """
        keys, values = (flat_tokens(pages, tokens) for pages in self.decode(fields))
        return partial_attention(query, keys, values if values.shape[-1] else keys, None, scale)

    def attend_weighted(
        self,
        query: Tensor,
        fields: dict[str, Tensor],
        tokens: int,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`attend` of a few queries, and the weights [R, H, Q, tokens] in float32, whose sum is 1.

        The queries have gone `into_pages`, and what is returned is not yet `out_of_pages`. `mask` is
        added to the scores, as in `partial_attention`.
        """
        keys, values = (flat_tokens(pages, tokens) for pages in self.decode(fields))
        return weighted_states(query, keys, values, mask, scale)

    def into_pages(self, query: Tensor, fields: dict[str, Tensor]) -> Tensor:
        """`query` as it meets the pages `fields`, rotated as they are: once for all of them."""
        return query

    def out_of_pages(self, out: Tensor) -> Tensor:
        """The output of attention over pages, as the model has it."""
        return out


def encoded(
    codec: PageCodec, keys: Tensor, values: Tensor, queries: Tensor | None
) -> dict[str, Tensor]:
    """`encode`, or `encode_observed` if the codec asks for `queries` and there are any."""
    if queries is None or not codec.observed_queries:
        return codec.encode(keys, values)
    return codec.encode_observed(keys, values, queries)


def decoded(codec: PageCodec, fields: dict[str, Tensor], with_values: bool) -> dict[str, Tensor]:
    """`keys` and, if they are asked for, `values` of encoded pages."""
    if not with_values:
        return {"keys": codec.decode_keys(fields)}
    keys, values = codec.decode(fields)
    return {"keys": keys, "values": values}


def flat_tokens(pages: Tensor, tokens: int) -> Tensor:
    """[R, H, s, P, D] as [R, H, tokens, D]: a view."""
    return pages.flatten(2, 3).narrow(2, 0, tokens)


def weighted_states(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_attention`, where keys without values are latents: their own values."""
    return weighted_attention(query, keys, values if values.shape[-1] else keys, mask, scale)


def check_states(codec: PageCodec, keys: Tensor, values: Tensor) -> None:
    """Refuse keys or values with a NaN or an infinity: few compressors can say what becomes of it."""
    ends = {  # `aminmax` would copy what is not dense, such as the tokens of a tail
        name: torch.stack([states.amin(), states.amax()])
        for name, states in (("key", keys), ("value", values))
        if states.numel()
    }
    if not torch.cat([*ends.values()]).isfinite().all():  # on a GPU the only one to wait for
        for name, both in ends.items():
            check_finite(codec, name, both)


def check_finite(codec: PageCodec, name: str, scale: Tensor) -> None:
    """Refuse what has no code: a NaN or infinity in the `name` makes a `scale` like it."""
    if not scale.isfinite().all():
        raise ValueError(
            f"{codec.title} cannot store {name}s that are NaN or infinite: look for the module "
            "that made them, or for a dtype that overflows (float16), with compressor='identity'."
        )
