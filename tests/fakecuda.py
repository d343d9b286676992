"""CUDA's fused attention on logical accelerators: its operators, and what they refuse.

Importing this module registers the devices of `fakegpu`, and lets pikv_kernels call on them the
operators that it calls on CUDA. Outputs have the strides of CUDA's.
"""

import math

import fakegpu  # first: before any model is built
import torch
from fakegpu import FakeGpuTensor, unwrap
from pikv_kernels import FUSED, partial_attention

HALVES = (torch.bfloat16, torch.float16)


def flash(query, key, value, dropout=0.0, is_causal=False, debug=False, *, scale=None):
    assert query.dtype in HALVES and query.shape[-1] == value.shape[-1] <= 256
    assert query.shape[-1] % 8 == 0 and not (dropout or is_causal or debug)
    out, lse = computed(query, key, value, None, scale)
    empty = torch.empty(0)
    return out, lse, empty, empty, query.shape[2], key.shape[2], empty, empty, empty


def efficient(query, key, value, bias, with_lse, dropout=0.0, is_causal=False, *, scale=None):
    assert query.dtype in (torch.float32, *HALVES) and with_lse and not (dropout or is_causal)
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.dtype == query.dtype
        assert bias.stride(3) == 1 and bias.storage_offset() % 8 == 0
        steps = [bias.stride(dim) for dim in range(3) if bias.shape[dim] > 1]
        assert not any(step % 8 for step in steps), f"strides {bias.stride()} are not aligned"
    out, lse = computed(query, key, value, bias, scale)
    padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.inf)
    padded[..., : lse.shape[2]] = lse
    return out, padded, torch.empty(0), torch.empty(0)


def computed(query, key, value, bias, scale):
    """Attention on the CPU, in memory as [B, R, H, Dv], as CUDA's kernels give it."""
    for states in (query, key, value):
        assert states.stride(-1) == 1 and states.dtype == query.dtype
    if bias is not None:  # kernels compute powers of 2
        assert math.log2(math.e) * bias.amin().float() > -math.inf, "such a mask becomes -inf"
    out, lse = partial_attention(query, key, value, bias, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


EMULATED = {
    "_scaled_dot_product_flash_attention.default": flash,
    "_scaled_dot_product_efficient_attention.default": efficient,
}
run_others = fakegpu.run


def run(func, args, kwargs):
    """Run one ATen operator: CUDA's fused attention here, all others as `fakegpu` does."""
    emulated = EMULATED.get(func.__name__)
    if emulated is None:
        return run_others(func, args, kwargs)
    device = fakegpu.device_of_result(func, args, kwargs, args)
    out = emulated(*map(unwrap, args), **kwargs)
    return tuple(FakeGpuTensor(t, device) if isinstance(t, torch.Tensor) else t for t in out)


fakegpu.run = run
FUSED["fakegpu"] = FUSED["cuda"]
