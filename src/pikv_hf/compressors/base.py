"""How a sealed page is stored, and how attention reads it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pikv_kernels import partial_attention, weighted_attention
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


class Compressor(ABC):
    """Encodes pages once, when they are sealed, and decodes them block by block when they are read.

    A compressor is a frozen dataclass: its own configuration, without run state. Nothing here
    changes its inputs. R rows, H KV heads, S pages of P tokens; Dk and Dv are the key and value
    dims, either may be 0.
    """

    #: Tokens of one row and KV head that attention decodes at a time; None = pages are read in place.
    block_tokens: ClassVar[int | None] = 2048

    #: Whether attention may use `attend_weighted`; else `into_pages` is never asked.
    gives_weights: ClassVar[bool] = False

    #: How many of a layer's newest tokens `encode_observed` sees the queries of; 0 = none.
    observed_queries: ClassVar[int] = 0

    #: Whether decoded pages are always the original ones, NaN and infinities included.
    is_lossless: ClassVar[bool] = False

    #: Whether it must be given a file that `pikv calibrate` made for the model.
    needs_calibration: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """How messages call it."""
        return type(self).__name__.lower()

    @property
    def is_idempotent(self) -> bool:
        """Whether decoded pages may be encoded again, as eviction does, with little further loss."""
        return True

    @property
    def is_per_token(self) -> bool:
        """Whether every token is encoded by itself: all fields are [R, H, S, P, ...].

        Tokens that move to other pages then keep their codes.
        """
        return False

    def check(self, model: PreTrainedModel) -> None:
        """Called once, before a cache is made for `model`.

        Raises:
            ValueError: it cannot serve this model, for instance as its calibration is of another.
        """
        return

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> "Compressor":
        """The compressor of one layer, for instance with weights that were calibrated for it.

        Raises:
            ValueError: it cannot serve this layer of a model of this configuration.
        """
        return self

    def of_head(self, head: int) -> "Compressor":
        """The compressor of one KV head of its layer, if heads are encoded differently; else itself.

        Pools, whose heads hold different numbers of pages, store each head's apart.
        """
        return self

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        """Called before a cache is made, for each layer of which the model tells what it caches.

        Raises:
            ValueError: it cannot store keys or values of these dims.
        """
        return

    def alternatives(self) -> "tuple[Compressor, ...]":
        """What to try when this one loses too much: its own options, or a relative. `Int8` is tried
        besides; a warning names those that lose less."""
        return ()

    def tensors(self) -> Iterator[Tensor]:
        """What it holds for the layer that it is bound to: a part of the cache's bytes."""
        return iter(())

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Encode `keys` [R, H, S, P, Dk] and `values` [R, H, S, P, Dv] into tensors [R, H, S, ...]."""

    def encode_observed(self, keys: Tensor, values: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """`encode`, knowing the newest `queries` [R, H, Q, Dk] that the layer has asked.

        Those of all query heads of a KV head stand side by side, scaled: their products with keys
        are what the softmax of attention is taken of. Zeros stand for padding. Called instead of
        `encode` if `observed_queries` asks for them.
        """
        return self.encode(keys, values)

    @abstractmethod
    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys [R, H, S, P, Dk] and values [R, H, S, P, Dv] of encoded pages."""

    def decode_keys(self, fields: dict[str, Tensor]) -> Tensor:
        """Those keys alone. To be overridden where values cost a decoding of their own."""
        return self.decode(fields)[0]

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of `query` [R, H, Q, Dk] over the first `tokens` of pages [R, H, s, ...].

        Returns `[R, H, Q, Dv]` and the log-sum-exp `[R, H, Q]`. Keys without values (Dv = 0) are
        latents, their own values. To be overridden where the encoding can be read directly.
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
        """What was answered there, as the model has it."""
        return out

    @abstractmethod
    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        """Bytes that a token of one KV head takes in a full page, of what is stored once for it, too.

        `element_size` is that of the model's dtype.
        """


def encoded(
    compressor: Compressor, keys: Tensor, values: Tensor, queries: Tensor | None
) -> dict[str, Tensor]:
    """`encode`, or `encode_observed` if the compressor asks for `queries` and there are any."""
    if queries is None or not compressor.observed_queries:
        return compressor.encode(keys, values)
    return compressor.encode_observed(keys, values, queries)


def decoded(
    compressor: Compressor, fields: dict[str, Tensor], with_values: bool
) -> dict[str, Tensor]:
    """`keys` and, if they are asked for, `values` of encoded pages."""
    if not with_values:
        return {"keys": compressor.decode_keys(fields)}
    keys, values = compressor.decode(fields)
    return {"keys": keys, "values": values}


# Bounds the float32 copies that encoding a long prompt makes. On a CPU larger ones leave its caches,
# and holes in the heap when they are freed: a hole or two for each encoding, so that chunks of a prompt,
# which are many, are encoded in smaller portions. Elsewhere every portion is kernels to launch.
PAGES_AT_A_TIME, FEWEST_AT_A_TIME, PORTIONS = 16, 4, 32
PAGES_ON_ACCELERATORS = 1024


def portion(states: Tensor) -> int:
    """How many of S pages are encoded at a time, for `states` [..., S, P, D]."""
    lead = states.shape[:-2]
    most = PAGES_ON_ACCELERATORS
    if states.device.type == "cpu":
        most = min(max(math.prod(lead) // PORTIONS, FEWEST_AT_A_TIME), PAGES_AT_A_TIME)
    return max(1, most // max(1, math.prod(lead[:-1])))


def in_portions(encode: Callable[[Tensor], dict[str, Tensor]], states: Tensor) -> dict[str, Tensor]:
    """`encode` of a few pages [n, P, D] after the other, for `states` [..., S, P, D].

    What is made in full is what is returned: not a dense copy of `states`, nor a list of parts.
    """
    lead, whole = states.shape[:-2], {}
    step = portion(states)
    for start in range(0, max(1, lead[-1]), step):
        pages = states.narrow(-3, start, min(step, lead[-1] - start))
        for name, part in encode(pages.flatten(0, -3)).items():
            if name not in whole:
                whole[name] = part.new_empty(*lead, *part.shape[1:])
            mine = whole[name].narrow(len(lead) - 1, start, pages.shape[-3])
            mine.copy_(part.view(mine.shape))
    return whole


def flat_tokens(pages: Tensor, tokens: int) -> Tensor:
    """[R, H, s, P, D] as [R, H, tokens, D]: a view."""
    return pages.flatten(2, 3).narrow(2, 0, tokens)


def weighted_states(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_attention`, where keys without values are latents: their own values."""
    return weighted_attention(query, keys, values if values.shape[-1] else keys, mask, scale)


def check_states(compressor: Compressor, keys: Tensor, values: Tensor) -> None:
    """Refuse keys or values with a NaN or an infinity: few compressors can say what becomes of it."""
    ends = {  # `aminmax` would copy what is not dense, such as the tokens of a tail
        name: torch.stack([states.amin(), states.amax()])
        for name, states in (("key", keys), ("value", values))
        if states.numel()
    }
    if not torch.cat([*ends.values()]).isfinite().all():  # on a GPU the only one to wait for
        for name, both in ends.items():
            check_finite(compressor, name, both)


def check_finite(compressor: Compressor, name: str, scale: Tensor) -> None:
    """Refuse what has no code: a NaN or infinity in the `name` makes a `scale` like it."""
    if not scale.isfinite().all():
        raise ValueError(
            f"{compressor.title} cannot store {name}s that are NaN or infinite: look for the module "
            "that made them, or for a dtype that overflows (float16), with compressor='identity'."
        )


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are scaled: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def narrowed(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Decoded `states` in `dtype`.

    Float16 ends at 65504: an original close to it may be decoded beyond, but is never infinite.
    """
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        states = states.clamp(-top, top)
    return states.to(dtype)
