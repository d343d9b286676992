"""Head dims and dtype of the keys and values that an attention module caches."""

from typing import Any

import torch
from torch import Tensor


def head_dims(module: Any) -> tuple[int, int] | None:
    """Return key and value dim of a KV head that `module` caches; (latent dim, 0) with MLA.

    None if the attributes of the module do not tell them before it runs.
    """
    rank, rotary = getattr(module, "kv_lora_rank", None), getattr(module, "qk_rope_head_dim", None)
    if hasattr(module, "kv_b_proj") and rank and rotary:
        return rank + rotary, 0
    dim = getattr(module, "head_dim", None)
    return (dim, getattr(module, "v_head_dim", dim)) if isinstance(dim, int) else None


def alike(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Convert `keys` and `values` to the wider of their dtypes: autocast widens rotary keys."""
    if keys.dtype == values.dtype:
        return keys, values
    dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(dtype), values.to(dtype)
