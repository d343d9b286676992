"""The operations of the kernels on codes: packing, float8, Hadamard."""

import pytest
import torch
from pikv_kernels import (
    hadamard,
    hadamard_reference,
    pack_codes,
    read_float8,
    read_float8_reference,
    unpack_codes,
    unpack_codes_reference,
)
from tolerances import FLOAT64
from variants import states


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim", [8, 20, 128])
def test_packed_codes(bits, dim) -> None:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-half, half, (3, 7, dim), generator=generator).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 7, dim * bits // 8) and packed.dtype == torch.int8
    assert torch.equal(unpack_codes(packed, bits), codes)
    assert torch.equal(unpack_codes_reference(packed, bits), codes)
    assert torch.equal(unpack_codes(packed[:, 2:5], bits), codes[:, 2:5])


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_all_float8_numbers(codes, dtype) -> None:
    every = torch.arange(256).to(torch.uint8).view(codes)
    every = every[every.float().isfinite()]
    assert torch.equal(read_float8(every, dtype), read_float8_reference(every, dtype))


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 80, 96, 128, 576])
def test_hadamard(dim) -> None:
    x, y = states("", 5, dim), states("", 5, dim, seed=1)
    assert torch.allclose(hadamard(x), hadamard_reference(x), rtol=0, atol=FLOAT64)
    assert torch.allclose(hadamard(hadamard(x)), x, rtol=0, atol=FLOAT64)
    assert torch.allclose(hadamard(x) @ hadamard(y).mT, x @ y.mT, rtol=0, atol=FLOAT64)
