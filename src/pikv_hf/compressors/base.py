"""How a sealed page is stored."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Compressor(ABC):
    """Encodes pages once, when they are sealed, and decodes them block by block when they are read.

    A compressor is a frozen dataclass: its own configuration, without run state. Nothing here
    changes its inputs. N pages of P tokens; Dk and Dv are the key and value dims, either may be 0.
    """

    #: Tokens of one row and KV head that attention decodes at a time; None = pages are read in place.
    block_tokens: ClassVar[int | None] = 2048

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Encode `keys` [N, P, Dk] and `values` [N, P, Dv] into tensors whose first dim is N."""

    @abstractmethod
    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys [..., P, Dk] and values [..., P, Dv] of encoded pages.

        `fields` are what `encode` returned, with any leading dims in the place of N.
        """

    @abstractmethod
    def bytes_per_token(self, key_dim: int, value_dim: int, element_size: int) -> float:
        """Bytes that a token of one KV head takes; `element_size` is that of the model's dtype."""
