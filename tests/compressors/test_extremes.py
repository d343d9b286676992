"""Compressors at the edges: numbers that are equal, alone, huge or tiny."""

import pytest
import torch
from helpers import SMALL, paged, spans_of, tiny
from pikv_kernels import partial_attention_reference
from test_combinations import UNCALIBRATED
from tolerances import ROUNDED
from torch import Tensor
from variants import (
    LOSSY,
    PAGE,
    REDUCED,
    SCALE,
    VARIANTS,
    distance,
    exact_attention,
    fitted,
    states,
)

from pikv_hf import PiKVCache
from pikv_hf.storage.codec import flat_tokens

DIM = 64


def pages_like(kind: str) -> Tensor:
    pages = states("", 2, 2, 2, PAGE, DIM)
    if kind == "equal":
        pages = pages[..., :1].expand(pages.shape)
    if kind == "alternating":
        pages = pages[..., :1] * (-1) ** torch.arange(DIM)
    if kind == "alone":
        pages = pages * (torch.arange(DIM) == 7)
    if kind == "one token":
        pages = pages * (torch.arange(PAGE) == 3)[:, None]
    return pages


@pytest.mark.parametrize("kind", ["equal", "alternating", "alone", "one token", "random"])
@pytest.mark.parametrize("name", [name for name in LOSSY if not VARIANTS[name].needs_calibration])
def test_no_worse_than_zeros(name, kind) -> None:
    pages = pages_like(kind).float()
    for near in VARIANTS[name].decode(VARIANTS[name].encode(pages, pages)):
        errors = (near - pages).norm(dim=-1)
        assert (errors.norm() <= 1.001 * pages.norm()).all()


@pytest.mark.parametrize(
    "dtype, size",
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 6.5e4),
        (torch.float16, 1e-7),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", UNCALIBRATED)
def test_a_number_far_from_the_others(name, dtype, size) -> None:
    """It is stored, and read back as a number: nothing calls it NaN."""
    model = tiny("mixtral", head_dim=16)
    cache = PiKVCache(model, compressor=name, **SMALL)
    layer = paged(cache)[1]
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(1, 2, 16, 16, generator=generator).to(dtype) for _ in range(2)]
    for part in pair:
        part[0, 1, 5, 3] = size
    layer.update(*pair)
    layer.finish()
    (span,) = spans_of(layer, [0])
    for part, original in zip(("keys", "values"), pair, strict=True):
        near, exact = span[part].double(), original[:, :, : len(span)].double()
        assert near.isfinite().all()
        assert (near - exact).norm() <= 1.001 * exact.norm()


@pytest.mark.parametrize("name", [None, *REDUCED, "identity", "int8", "fp8", "turboquant"])
@pytest.mark.parametrize("queries", [2, 2 * PAGE])
def test_products_that_exceed_float16(name, queries) -> None:
    """Scaled scores are in its range, the products are not."""
    keys, values, query = (states("", 2, 2, 2, PAGE, DIM, seed=s).half() for s in range(3))
    keys, query = keys * 300, query.flatten(2, 3)[:, :, :queries] * 100
    if name is None:
        near = [flat_tokens(pages, 2 * PAGE) for pages in (keys, values)]
        out, lse = partial_attention_reference(query, *near, None, SCALE)
    else:
        compressor = fitted(name)
        fields = compressor.encode(keys, values)
        out, lse = compressor.attend(query, fields, 2 * PAGE, SCALE)
        near = [flat_tokens(pages, 2 * PAGE) for pages in compressor.decode(fields)]
    expected, expected_lse = exact_attention(query, *near)
    assert expected_lse.abs().max() > 1e4
    assert distance(out, expected) <= ROUNDED[torch.float16]
    assert distance(lse, expected_lse) <= ROUNDED[torch.float16]
