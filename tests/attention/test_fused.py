"""Torch's fused attention kernels, with their log-sum-exp, equal plain torch."""

import pytest
import torch
from pikv_kernels import lowest_score, new_mask, partial_attention
from test_placement import run_on_fakegpu
from tolerances import ROUNDED, WIDE_SCORES


def test_the_kernels_of_cuda_are_called_as_they_ask() -> None:
    """On a logical device, with CUDA's operators, dims, masks and strides."""
    run_on_fakegpu("fused_on_fakegpu.py")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (576, 512)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_on_cuda(dtype, dims, masked) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, n, dim, generator=generator, device="cuda", dtype=dtype)
        for n, dim in ((5, dims[0]), (1037, dims[0]), (1037, dims[1]))
    )
    mask = None
    if masked:
        hidden = torch.rand(2, 1, 5, 1037, generator=generator, device="cuda") < 0.3
        hidden[0, 0, 0] = True  # this query sees nothing
        mask = new_mask(query, 2, 1, 5, 1037).masked_fill_(hidden, lowest_score(dtype))
    out, lse = partial_attention(query, key, value, mask, dims[0] ** -0.5)
    wide = [None if t is None else t.double() for t in (query, key, value, mask)]
    exact, exact_lse = partial_attention(*wide, dims[0] ** -0.5)
    seen = exact_lse > lowest_score(dtype) / 2
    assert out.isfinite().all()
    assert (out - exact)[seen].abs().max() <= ROUNDED[dtype] * exact.abs().max()
    assert (lse - exact_lse)[seen].abs().max() <= WIDE_SCORES * exact_lse[seen].abs().max()
    assert (lse[~seen] < lowest_score(dtype) / 2).all()
