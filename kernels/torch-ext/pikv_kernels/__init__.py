"""Attention operations of PiKV: torch and triton only, nothing of transformers."""

from .partial_attention import (
    add_sink,
    merge_partial,
    partial_attention,
    partial_attention_reference,
)

__all__ = ["add_sink", "merge_partial", "partial_attention", "partial_attention_reference"]
