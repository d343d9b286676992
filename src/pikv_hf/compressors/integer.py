from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pikv_kernels import (
    Quantized,
    dequantize,
    hadamard,
    pack_codes,
)
from torch import Tensor

from .base import Compressor, computed_dtype, in_portions, narrowed
from .coded import Coded

KEY_AXES = ("token", "channel")

# Scales to try, as shares of the scale whose codes reach the largest number: the fewer codes, the
# more clipping gains. 1 is always tried, so that decoded pages are encoded again without loss.
SHRINK = {8: (1.0,), 4: (1.0, 0.94, 0.85, 0.75), 2: (1.0, 0.75, 0.64, 0.52, 0.41)}


@dataclass(frozen=True)
class Integer(Coded):
    """Stores integer codes with a scale for each token, group of dims or channel of a page.

    number = scale * (code + 1/2), or scale * code with 8 symmetric bits, + zero if not symmetric.
    Scales and zeros have the dtype of the model. With 4 and 2 bits a few scales are tried, and the
    scale of least squared error is used. Values, and keys by default, are quantized per token;
    `key_axis="channel"` quantizes keys per channel within a page (KIVI, arXiv 2402.02750). With
    `rotate`, numbers quantized per token are rotated by a Hadamard matrix, which spreads outlier
    channels (QuaRot, arXiv 2404.00456): attention rotates query and output instead of the pages.
    Latents (keys without values) are always quantized per token, because they are values, too.

    Args:
        symmetric: if False, each scale has a zero beside it.
        key_axis: "token" or "channel".
        group_size: dims that share a scale per token; None = all. It must divide the head dims.
        rotate: rotate in blocks of the largest power of two that divides the head dim.
    """

    bits: ClassVar[int]

    symmetric: bool = True
    key_axis: str = "token"
    group_size: int | None = None
    rotate: bool = True

    def __post_init__(self) -> None:
        for name in ("symmetric", "rotate"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be True or False.")
        if self.key_axis not in KEY_AXES:
            raise ValueError(f"`key_axis` is {self.key_axis!r}; it must be one of {KEY_AXES}.")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"`group_size` is {size!r}; it must be a positive whole number, or None for all dims."
            )

    def alternatives(self) -> tuple[Compressor, ...]:
        others: list[Compressor] = [] if self.rotate else [replace(self, rotate=True)]
        if self.key_axis == "token":
            others.append(replace(self, key_axis="channel"))
        return (*others, Int4()) if self.bits == 2 else tuple(others)

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        title, per_byte = type(self).__name__.lower(), 8 // self.bits
        for name, dim in (("key", key_dim), ("value", value_dim)):
            if self.group_size is not None and dim % self.group_size:
                raise ValueError(
                    f"`group_size` of {title} is {self.group_size}, which does not divide the {name} "
                    f"dim {dim}; it must be a divisor of it, or None."
                )
            if dim % per_byte:
                raise ValueError(
                    f"{title} packs {per_byte} numbers into a byte, but the {name} dim is {dim}; use "
                    "int8 or fp8."
                )

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        self.check_dims(keys.shape[-1], values.shape[-1])
        by_channel = self._has_channel_keys(values)
        return self._encode("key", keys, by_channel) | self._encode("value", values, False)

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.decode_keys(fields), self._decode("value", fields, False)

    def decode_keys(self, fields: dict[str, Tensor]) -> Tensor:
        return self._decode("key", fields, self._has_channel_keys(fields["value_codes"]))

    def into_pages(self, query: Tensor, fields: dict[str, Tensor]) -> Tensor:
        query = super().into_pages(query, fields)
        if not self.rotate or self._has_channel_keys(fields["value_codes"]):
            return query
        return hadamard(query.to(computed_dtype(query.dtype))).to(query.dtype)

    def out_of_pages(self, out: Tensor) -> Tensor:
        return hadamard(out) if self.rotate else out

    @property
    def is_per_token(self) -> bool:
        return self.key_axis == "token"

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        each = element_size * (1 if self.symmetric else 2)
        total = (key_dim + value_dim) * self.bits / 8
        groups: list[float] = [
            dim // (self.group_size or max(dim, 1)) for dim in (key_dim, value_dim)
        ]
        if self.key_axis == "channel" and value_dim:
            groups[0] = key_dim / page_size
        return total + each * sum(groups)

    def _encode(self, name: str, states: Tensor, by_channel: bool) -> dict[str, Tensor]:
        dim = states.shape[-1]
        if dim == 0:
            return {f"{name}_codes": states.to(torch.int8), f"{name}_scale": states}
        rotated = self.rotate and not by_channel

        def quantize(pages: Tensor) -> dict[str, Tensor]:
            pages = pages.to(computed_dtype(states.dtype))
            return self._quantize(hadamard(pages) if rotated else pages, by_channel, states.dtype)

        fields = in_portions(quantize, states)
        return {f"{name}_{part}": tensor for part, tensor in fields.items()}

    def _quantize(self, pages: Tensor, by_channel: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return packed `codes`, `scale` and, if not symmetric, `zero` of `pages` [n, P, D]."""
        axis, shape = (1, pages.shape) if by_channel else (-1, pages.shape)
        if not by_channel:
            pages = pages.unflatten(-1, (-1, self.group_size or pages.shape[-1]))
        zero = None
        if not self.symmetric:
            zero = ((pages.amax(axis, True) + pages.amin(axis, True)) / 2).to(dtype)
            pages = pages - zero
        codes, scale = _nearest_codes(pages, axis, self.bits, self._offset, dtype)
        fields = {"scale": scale} if zero is None else {"scale": scale, "zero": zero}
        if not by_channel:
            fields = {name: tensor.squeeze(-1) for name, tensor in fields.items()}
        return fields | {"codes": pack_codes(codes.view(shape), self.bits)}

    @property
    def _offset(self) -> float:
        """Number added to a code: 0 for 8 symmetric bits, else 1/2: a level at 0 wastes a code."""
        return 0.0 if self.bits == 8 and self.symmetric else 0.5

    def _numbers(self, name: str, fields: dict[str, Tensor]) -> Quantized:
        scale, zero = fields[f"{name}_scale"], fields.get(f"{name}_zero")
        dtype = computed_dtype(scale.dtype)
        zero = None if zero is None else zero.to(dtype)
        codes = fields[f"{name}_codes"]
        return Quantized(codes, scale.to(dtype), zero, self.bits, self._offset)

    def _decode(self, name: str, fields: dict[str, Tensor], by_channel: bool) -> Tensor:
        codes, dtype = fields[f"{name}_codes"], fields[f"{name}_scale"].dtype
        if codes.shape[-1] == 0:
            return codes.to(dtype)
        states = dequantize(self._numbers(name, fields), computed_dtype(dtype))
        return narrowed(hadamard(states) if self.rotate and not by_channel else states, dtype)

    def _has_channel_keys(self, values: Tensor) -> bool:
        """Return whether keys beside `values` are quantized per channel, and not rotated."""
        return self.key_axis == "channel" and values.shape[-1] > 0


@dataclass(frozen=True)
class Int8(Integer):
    """Integer codes of 8 bits, not rotated: 1 + 2/D bytes an element. Options: see `Integer`."""

    bits: ClassVar[int] = 8

    rotate: bool = False


@dataclass(frozen=True)
class Int4(Integer):
    """Integer codes of 4 bits, rotated: 1/2 + 2/D bytes an element. Options: see `Integer`."""

    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Int2(Integer):
    """Integer codes of 2 bits, rotated: 1/4 + 2/D bytes an element. Options: see `Integer`."""

    bits: ClassVar[int] = 2


def _nearest_codes(
    states: Tensor, axis: int, bits: int, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return int8 codes in the shape of `states`, and scales in `dtype`, 0 where all are zero."""
    highest = 2 ** (bits - 1) - 1
    lowest = -highest if offset == 0 else -highest - 1
    widest = states.abs().amax(axis, keepdim=True) / (highest + offset)

    def codes_of(scale: Tensor) -> Tensor:
        codes = states / scale.to(states.dtype).clamp_min(torch.finfo(torch.float32).tiny)
        return codes.sub_(offset).round_().clamp_(lowest, highest)

    scales = [(widest * shrink).to(dtype) for shrink in SHRINK[bits]]
    best, min_error = scales[0], None
    for scale in scales if len(scales) > 1 else ():
        restored = codes_of(scale).add_(offset)
        error = torch.addcmul(states, restored, scale.to(states.dtype), value=-1)
        error = error.square_().sum(axis, keepdim=True)
        if min_error is not None:
            best = torch.where(error < min_error, scale, best)
        min_error = error if min_error is None else error.minimum(min_error)
    if min_error is not None:  # few codes may be worse than all zeros, as beside one outlier
        best = best.masked_fill(min_error > states.square().sum(axis, keepdim=True), 0)
    # Computing the codes again is cheaper than choosing among the codes of all scales.
    return codes_of(best).to(torch.int8), best
