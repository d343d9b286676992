from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Compressor


def _quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of the shape of `states` and their scale [..., 1]; a zero token gets scale 0."""
    if states.shape[-1] == 0:
        return states.to(torch.int8), states
    scale = (states.abs().amax(dim=-1, keepdim=True).float() / 127).to(states.dtype)
    divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(states.float() / divisor).clamp_(-127, 127).to(torch.int8), scale


@dataclass(frozen=True)
class Int8(Compressor):
    """Symmetric 8-bit codes with one scale per token and KV head, for keys and for values.

    scale = max|x| / 127 over the head dim, in the dtype of the model; code = round(x / scale).
    1 + 2/D bytes an element for a 16-bit model. The per-token quantization of KIVI (arXiv
    2402.02750, section 3.1) with 8 bits, for keys too.
    """

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        key_codes, key_scale = _quantize(keys)
        value_codes, value_scale = _quantize(values)
        return {
            "key_codes": key_codes,
            "key_scale": key_scale,
            "value_codes": value_codes,
            "value_scale": value_scale,
        }

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        keys = fields["key_codes"] * fields["key_scale"]
        return keys, fields["value_codes"] * fields["value_scale"]

    def bytes_per_token(self, key_dim: int, value_dim: int, element_size: int) -> float:
        scales = element_size * ((key_dim > 0) + (value_dim > 0))
        return float(key_dim + value_dim + scales)
