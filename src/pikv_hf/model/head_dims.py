"""What an attention module caches: head dims, as far as they can be told before it runs, and dtype."""

from typing import Any

import torch
from torch import Tensor


def head_dims(module: Any) -> tuple[int, int] | None:
    """Key and value dim of a KV head that `module` caches; (latent dim, 0) with MLA.

    Read from its attributes; None where they do not say.
    """
    rank, rotary = getattr(module, "kv_lora_rank", None), getattr(module, "qk_rope_head_dim", None)
    if hasattr(module, "kv_b_proj") and rank and rotary:
        return rank + rotary, 0
    dim = getattr(module, "head_dim", None)
    return (dim, getattr(module, "v_head_dim", dim)) if isinstance(dim, int) else None


def alike(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`keys` and `values` in the wider of their dtypes: under autocast, rotary keys are wider."""
    if keys.dtype == values.dtype:
        return keys, values
    dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(dtype), values.to(dtype)
