"""Visible columns in the attention masks that models make."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .versions import attention_implementation, has_readable_masks


def visible_columns(mask: Tensor | None, length: int) -> Tensor | None:
    """Return which of the last `length` columns the newest query sees; None = all.

    The result is [B or 1, length] bool. `mask` as the model made it: bool or additive
    [B, 1, q, columns], or bool-like [B, columns].
    """
    if mask is None:
        return None
    last = mask[:, -length:] if mask.dim() == 2 else mask[:, 0, -1, -length:]
    if last.is_floating_point():
        return last > torch.finfo(last.dtype).min / 2
    return last.bool()


def check_masks(config: PreTrainedConfig) -> None:
    """Refuse the attention implementation of `config` if its masks cannot be read.

    Called in every forward pass, because users may set another implementation at any time.
    """
    name = attention_implementation(config)
    if not has_readable_masks(name):
        raise ValueError(
            f"`model` uses attn_implementation={name!r}, whose masks PiKVCache cannot read; load it "
            "with 'sdpa', 'eager' or a flash-attention implementation, or set one of them."
        )
