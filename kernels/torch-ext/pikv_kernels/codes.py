"""Signed integer codes of 8, 4 or 2 bits, packed into bytes along the last dim.

Byte j of a packed row holds the codes of dims j, j + D/n, j + 2D/n, ... (n codes a byte), the first
in its lowest bits: each n-th part of a row unpacks by one shift, without interleaving.
"""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 `codes` `[..., D]`, in [-2^(bits-1), 2^(bits-1)), into `[..., D * bits / 8]`."""
    if bits == 8:
        return codes
    mask = (1 << bits) - 1
    packed = torch.zeros_like(codes[..., : codes.shape[-1] * bits // 8])
    for number, part in enumerate(codes.chunk(8 // bits, dim=-1)):
        packed |= (part & mask) << (bits * number)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Invert `pack_codes`: return int8 `[..., D]`."""
    if bits == 8:
        return packed
    # Shifted up, so that each code is highest in its byte, then down, which extends the sign.
    raised = [packed << (8 - bits * (number + 1)) for number in range(8 // bits)]
    return torch.cat(raised, dim=-1).bitwise_right_shift_(8 - bits)


def unpack_codes_reference(packed: Tensor, bits: int) -> Tensor:
    """Do the work of `unpack_codes` in plain arithmetic."""
    size, unsigned = 1 << bits, packed.long() % 256
    parts = [unsigned // size**number % size for number in range(8 // bits)]
    codes = torch.cat(parts, dim=-1)
    return torch.where(codes < size // 2, codes, codes - size).to(torch.int8)
