"""Torch's fused attention kernels that return the log-sum-exp, by type of device.

Shapes: B rows, H KV heads, R query rows per KV head, T keys, D key dim, Dv value dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Rows of a mask begin at multiples of this many elements: CUDA's kernel reads 16 bytes at a time.
ALIGNED = 16
# The largest head dim of CUDA's flash attention.
MAX_FLASH_DIM = 256

# None in a torch without them.
_flash_cpu = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_cuda = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
_efficient_cuda = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)

Fused = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor] | None]


def fused_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Run flash attention on a CPU; None if keys and values differ in their dims."""
    fits = key.shape[-1] == value.shape[-1] and query.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    )
    if _flash_cpu is None or not fits:
        return None
    out, lse = _flash_cpu(query, key, value, attn_mask=mask, scale=scale)
    return out, lse


def fused_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Run flash attention on CUDA, or memory-efficient attention with a mask or other dims."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    dim, per_read = query.shape[-1], 16 // query.element_size()
    if dim % per_read or value.shape[-1] % per_read:
        return None
    is_half = query.dtype != torch.float32
    is_flash = mask is None and is_half and dim == value.shape[-1] <= MAX_FLASH_DIM
    if is_flash and _flash_cuda is not None:
        out, lse, *_ = _flash_cuda(query, key, value, 0.0, False, False, scale=scale)
        return out, lse
    if _efficient_cuda is None:
        return None
    bias = None if mask is None else _aligned(mask, query, key.shape[2])
    out, lse, *_ = _efficient_cuda(query, key, value, bias, True, 0.0, False, scale=scale)
    return out, lse[..., : query.shape[2]]  # its rows are padded


#: Type of device -> its kernel, which returns None for tensors that it cannot take.
FUSED: dict[str, Fused] = {"cpu": fused_cpu, "cuda": fused_cuda}


def new_mask(like: Tensor, *shape: int) -> Tensor:
    """Return an additive mask of zeros in the dtype of `like`; off the CPU its rows are aligned."""
    if like.device.type == "cpu":
        return like.new_zeros(shape)
    *lead, keys = shape
    return like.new_zeros(*lead, -(-keys // ALIGNED) * ALIGNED)[..., :keys]


def lowest_score(dtype: torch.dtype) -> float:
    """Return the number that a mask adds to hide a key.

    It is half of the dtype's minimum: kernels multiply scores by log2(e), and the minimum would
    become -inf, and NaN in a row that sees nothing.
    """
    return torch.finfo(dtype).min / 2


def _aligned(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """Return `mask` as [B, H, R, T] with aligned rows; a mask of `new_mask` is not copied."""
    steps = [s for n, s in zip(mask.shape[:-1], mask.stride(), strict=False) if n > 1]
    if any(step % ALIGNED for step in (*steps, mask.storage_offset())):
        mask = new_mask(mask, *mask.shape).copy_(mask)
    return mask.expand(*query.shape[:3], keys)
