"""How a sealed page is stored, and how attention reads it."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pikv_kernels import partial_attention
from torch import Tensor


class Compressor(ABC):
    """Encodes pages once, when they are sealed, and decodes them block by block when they are read.

    A compressor is a frozen dataclass: its own configuration, without run state. Nothing here
    changes its inputs. N pages of P tokens; Dk and Dv are the key and value dims, either may be 0.
    """

    #: Tokens of one row and KV head that attention decodes at a time; None = pages are read in place.
    block_tokens: ClassVar[int | None] = 2048

    @property
    def is_idempotent(self) -> bool:
        """Whether decoded pages can be encoded again without a further loss, as eviction does."""
        return True

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Encode `keys` [N, P, Dk] and `values` [N, P, Dv] into tensors whose first dim is N."""

    @abstractmethod
    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys [..., P, Dk] and values [..., P, Dv] of encoded pages.

        `fields` are what `encode` returned, with any leading dims in the place of N.
        """

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Partial attention of `query` [R, H, Q, Dk] over the first `tokens` of pages [R, H, s, ...].

        Returns `[R, H, Q, Dv]` and the log-sum-exp `[R, H, Q]`. Keys without values (Dv = 0) are
        latents, their own values. To be overridden where the encoding can be read directly.
        """
        keys, values = (flat_tokens(pages, tokens) for pages in self.decode(fields))
        return partial_attention(query, keys, values if values.shape[-1] else keys, None, scale)

    @abstractmethod
    def bytes_per_token(self, key_dim: int, value_dim: int, element_size: int) -> float:
        """Bytes that a token of one KV head takes; `element_size` is that of the model's dtype."""


def flat_tokens(pages: Tensor, tokens: int) -> Tensor:
    """[R, H, s, P, D] as [R, H, tokens, D]: a view."""
    return pages.flatten(2, 3).narrow(2, 0, tokens)


def check_finite(compressor: Compressor, name: str, scale: Tensor) -> None:
    """Refuse what has no code: a NaN or infinity in the `name` makes a `scale` like it."""
    if not scale.isfinite().all():
        title = type(compressor).__name__.lower()
        raise ValueError(
            f"{title} cannot store {name}s that are NaN or infinite: look for the module that made "
            "them, or for a dtype that overflows (float16), with compressor='identity'."
        )


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are scaled: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)
