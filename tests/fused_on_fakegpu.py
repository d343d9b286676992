"""Run by attention/test_fused.py in a process of its own: which kernel of CUDA is called, and how."""

import fakecuda  # first: before any model is built
import torch
from fakegpu import FakeGpuTensor
from pikv_kernels import lowest_score, new_mask, partial_attention
from tolerances import ROUNDED, WIDE_SCORES

HERE = torch.device("fakegpu", 0)
CALLED: list[str] = []


def noted(name: str):
    kernel = fakecuda.EMULATED[name]

    def run(*args, **kwargs):
        CALLED.append(name.split("_")[4])
        return kernel(*args, **kwargs)

    return run


def on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else FakeGpuTensor(tensor, HERE)


def check(dtype, dims, masked, called) -> None:
    """`dims` of keys and values; `masked`: "no", one mask for all rows and heads, or one of each."""
    generator = torch.Generator().manual_seed(0)
    lead = {"one": (1, 1, 1), "each": (2, 3, 5)}.get(masked, ())
    query, key, value = (
        torch.randn(2, 3, n, dim, generator=generator).to(dtype)
        for n, dim in ((5, dims[0]), (37, dims[0]), (37, dims[1]))
    )
    mask = None
    if masked != "no":
        hidden = torch.rand(*lead, 37, generator=generator) < 0.3
        if masked == "each":
            hidden[0, 0, 0] = True  # this query sees nothing
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, lowest_score(dtype))
    CALLED.clear()
    here = map(on_device, (query, key, value, mask))
    out, lse = (t.cpu() for t in partial_attention(*here, dims[0] ** -0.5))
    assert called == CALLED
    wide = [None if t is None else t.double() for t in (query, key, value, mask)]
    exact, exact_lse = partial_attention(*wide, dims[0] ** -0.5)
    assert out.isfinite().all() and out.dtype == dtype
    assert out.shape == exact.shape and lse.shape == exact_lse.shape
    seen = exact_lse > lowest_score(dtype) / 2
    assert (out - exact)[seen].abs().max() <= ROUNDED[dtype] * exact.abs().max()
    assert (lse - exact_lse)[seen].abs().max() <= WIDE_SCORES * exact_lse[seen].abs().max()
    assert (lse[~seen] < lowest_score(dtype) / 2).all(), "such a query has no weight"


def main() -> None:
    torch.set_num_threads(1)
    for name in fakecuda.EMULATED:
        fakecuda.EMULATED[name] = noted(name)
    half, single = torch.bfloat16, torch.float32
    check(half, (64, 64), "no", ["flash"])
    check(torch.float16, (128, 128), "no", ["flash"])
    for dtype, dims, masked in (
        (half, (64, 64), "one"),
        (half, (64, 64), "each"),
        (half, (576, 512), "no"),  # latents
        (half, (320, 320), "no"),
        (single, (64, 64), "no"),
        (single, (64, 32), "each"),
    ):
        check(dtype, dims, masked, ["efficient"])
    check(half, (36, 36), "no", [])  # 72 bytes are no multiple of 16
    check(torch.float64, (64, 64), "one", [])
    sample = FakeGpuTensor(torch.zeros(1, dtype=half), HERE)
    assert new_mask(sample, 2, 1, 37).stride() == (48, 48, 1)


main()
