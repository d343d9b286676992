"""Attention operations of PiKV, which import torch or triton but not transformers."""

from .codebook import (
    PACKED_TOGETHER,
    look_up,
    look_up_reference,
    pack_indices,
    word_table,
)
from .codes import pack_codes, unpack_codes, unpack_codes_reference
from .float8 import read_float8, read_float8_reference
from .fused_attention import FUSED, lowest_score, new_mask
from .hadamard import hadamard, hadamard_block, hadamard_reference
from .lowrank_attention import Factors, lowrank_attention, lowrank_attention_reference
from .merge_segments import merge_segments, merge_segments_reference
from .partial_attention import (
    merge_partial,
    merge_partials,
    merge_with_lse,
    partial_attention,
    partial_attention_reference,
)
from .quantized_attention import (
    Quantized,
    dequantize,
    quantized_attention,
    quantized_attention_reference,
    quantized_weights,
)
from .weighted_attention import (
    is_fast_bfloat16,
    weighted_attention,
    weighted_attention_reference,
)

__all__ = [
    "FUSED",
    "PACKED_TOGETHER",
    "Factors",
    "Quantized",
    "dequantize",
    "hadamard",
    "hadamard_block",
    "hadamard_reference",
    "is_fast_bfloat16",
    "look_up",
    "look_up_reference",
    "lowest_score",
    "lowrank_attention",
    "lowrank_attention_reference",
    "merge_partial",
    "merge_partials",
    "merge_segments",
    "merge_segments_reference",
    "merge_with_lse",
    "new_mask",
    "pack_codes",
    "pack_indices",
    "partial_attention",
    "partial_attention_reference",
    "quantized_attention",
    "quantized_attention_reference",
    "quantized_weights",
    "read_float8",
    "read_float8_reference",
    "unpack_codes",
    "unpack_codes_reference",
    "weighted_attention",
    "weighted_attention_reference",
    "word_table",
]
