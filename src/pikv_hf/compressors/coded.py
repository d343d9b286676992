from abc import abstractmethod
from typing import ClassVar

import torch
from pikv_kernels import Quantized, quantized_attention, quantized_weights
from torch import Tensor

from .base import Compressor


class Coded(Compressor):
    """Base of compressors that store codes with scales: attention reads codes without decoding."""

    gives_weights: ClassVar[bool] = True

    @abstractmethod
    def _numbers(self, name: str, fields: dict[str, Tensor]) -> Quantized:
        """Return codes and scales of the keys (`name` is "key") or values ("value") of pages."""

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, numbers = self.into_pages(query, fields), self._both(fields)
        out, lse = quantized_attention(query, *numbers, tokens, scale)
        return self.out_of_pages(out), lse

    def attend_weighted(
        self,
        query: Tensor,
        fields: dict[str, Tensor],
        tokens: int,
        scale: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return quantized_weights(query, *self._both(fields), tokens, scale, mask)

    def into_pages(self, query: Tensor, fields: dict[str, Tensor]) -> Tensor:
        # Products with codes of 8 bits overflow float16.
        return query.float() if query.dtype == torch.float16 else query

    def _both(self, fields: dict[str, Tensor]) -> tuple[Quantized, Quantized | None]:
        """Return keys and values; values are None for latents, which are their own values."""
        is_latent = fields["value_codes"].shape[-1] == 0
        return self._numbers("key", fields), None if is_latent else self._numbers("value", fields)
