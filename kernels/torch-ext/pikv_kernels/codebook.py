"""Packed indices into a codebook of 4, 8 or 16 levels; levels are looked up from whole bytes.

Indices fill a word from its lowest bit, and words fill bytes in the same way. A word is a byte, or
12 bits for indices of 3 bits (two words in three bytes). One entry of a table holds all levels of a
word, so that they are fetched together.
"""

import torch
from torch import Tensor

# By the bits of an index: indices in a word, and the fewest indices that fill whole bytes.
_PER_WORD = {2: 4, 3: 4, 4: 2}
PACKED_TOGETHER = {2: 4, 3: 8, 4: 2}

# By number of bytes: a dtype that holds all levels of a word.
_HOLDER = {4: torch.int32, 8: torch.int64, 16: torch.complex128}


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Pack `indices` `[..., D]` below 2^bits into uint8 `[..., D * bits / 8]`.

    D is a multiple of `PACKED_TOGETHER[bits]`.
    """
    parts = indices.to(torch.int32).unflatten(-1, (-1, PACKED_TOGETHER[bits])).unbind(-1)
    joined = parts[0]
    for place, part in enumerate(parts[1:], start=1):
        joined = joined | part << place * bits
    if bits != 3:
        return joined.to(torch.uint8)
    shifts = torch.arange(0, 24, 8, device=indices.device, dtype=torch.int32)
    return (joined[..., None] >> shifts & 255).to(torch.uint8).flatten(-2)


def word_table(levels: Tensor, bits: int) -> Tensor:
    """Return the table of `look_up` for `levels` `[2^bits]` of a dtype of 16 or 32 bits."""
    words = torch.arange(2 ** (bits * _PER_WORD[bits]), device=levels.device)
    shifts = bits * torch.arange(_PER_WORD[bits], device=levels.device)
    table = levels[words[:, None] >> shifts & (2**bits - 1)]
    return table.view(_HOLDER[table.shape[-1] * table.element_size()]).flatten()


def look_up(packed: Tensor, table: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the levels `[..., D]` of packed indices; `table` is their `word_table`, in `dtype`."""
    words = _words(packed, bits)
    levels = table.index_select(0, words.flatten()).view(dtype)
    return levels.view(*words.shape[:-1], words.shape[-1] * _PER_WORD[bits])


def look_up_reference(packed: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Do the work of `look_up` bit by bit, with `levels` instead of a table."""
    each_bit = packed[..., None].long() // 2 ** torch.arange(8, device=packed.device) % 2
    indices = each_bit.flatten(-2).unflatten(-1, (-1, bits))
    return levels[(indices * 2 ** torch.arange(bits, device=packed.device)).sum(-1)]


def _words(packed: Tensor, bits: int) -> Tensor:
    """Split bytes into words, int32 `[..., number of words]`."""
    if bits != 3:
        return packed.to(torch.int32)
    low, middle, high = packed.unflatten(-1, (-1, 3)).to(torch.int32).unbind(-1)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=-1).flatten(-2)
