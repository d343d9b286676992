import functools
from dataclasses import dataclass

import torch
from pikv_kernels import Quantized, dequantize
from torch import Tensor

from .base import Compressor, computed_dtype, in_portions, narrowed
from .coded import Coded

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8(Coded):
    """Stores 8-bit floats with one scale per page and KV head, for keys and for values.

    scale = max|x| / (largest number of the format), in the dtype of the model. Numbers keep about
    the same relative error however small they are, so outlier channels need no scale of their own.
    arXiv 2209.05433 defines the formats.

    Args:
        format: "e4m3" (relative error up to 1/16, range 2^17) or "e5m2" (1/8, 2^31).
    """

    format: str = "e4m3"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"`format` is {self.format!r}; it must be one of {[*FORMATS]}.")

    def alternatives(self) -> tuple[Compressor, ...]:
        return () if self.format == "e4m3" else (Fp8(),)

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return self._encode("key", keys) | self._encode("value", values)

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._decode("key", fields), self._decode("value", fields)

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        scales = element_size * ((key_dim > 0) + (value_dim > 0))
        return key_dim + value_dim + scales / page_size

    def _encode(self, name: str, states: Tensor) -> dict[str, Tensor]:
        if states.shape[-1] == 0:
            return {f"{name}_codes": states.to(torch.int8), f"{name}_scale": states[..., :1, :]}
        return in_portions(functools.partial(self._quantize, name), states)

    def _quantize(self, name: str, pages: Tensor) -> dict[str, Tensor]:
        """Return codes and scale of `pages` [n, P, D]."""
        codes_dtype, dtype = FORMATS[self.format], computed_dtype(pages.dtype)
        top = torch.finfo(codes_dtype).max
        scale = (pages.abs().amax((-2, -1), keepdim=True).to(dtype) / top).to(pages.dtype)
        divisor = scale.to(dtype).clamp_min(torch.finfo(torch.float32).tiny)
        # The rounded scale may be slightly too small, and float8 has NaN beyond its largest number.
        codes = (pages / divisor).clamp_(-top, top).to(codes_dtype)
        # Stored as bytes, which torch copies, gathers and saves on every device.
        return {f"{name}_codes": codes.view(torch.int8), f"{name}_scale": scale}

    def _numbers(self, name: str, fields: dict[str, Tensor]) -> Quantized:
        codes, scale = fields[f"{name}_codes"], fields[f"{name}_scale"]
        return Quantized(codes.view(FORMATS[self.format]), scale.to(computed_dtype(scale.dtype)))

    def _decode(self, name: str, fields: dict[str, Tensor]) -> Tensor:
        codes, dtype = fields[f"{name}_codes"], fields[f"{name}_scale"].dtype
        if codes.shape[-1] == 0:
            return codes.to(dtype)
        return narrowed(dequantize(self._numbers(name, fields), computed_dtype(dtype)), dtype)
