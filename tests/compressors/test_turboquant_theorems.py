"""TurboQuant: the distortion and the inner products that its paper proves (arXiv 2504.19874)."""

import math

import pytest
import torch
from directions import GAUSSIAN, all_bits, directions, random
from tolerances import PUBLISHED
from torch.nn.functional import normalize

from pikv_hf.compressors import TurboQuant, turboquant


def test_codebook_of_a_large_dim_is_that_of_max() -> None:
    """J. Max, Quantizing for minimum distortion, 1960, table I."""
    expected = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    for bits, upper in expected.items():
        levels = turboquant._codebook(bits, 2**14)
        half = torch.tensor(upper, dtype=levels.dtype)
        torch.testing.assert_close(levels, torch.cat([-half.flip(0), half]), rtol=PUBLISHED, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [8, 80, 576])
def test_codebook_is_optimal(bits, dim) -> None:
    """Every level is the mean of the coordinates that are nearest to it; vectors are drawn."""
    levels = turboquant._codebook(bits, dim)
    drawn = normalize(random(2_000_000 // dim, dim, dtype=torch.float64), dim=-1).flatten()
    drawn = drawn * dim**0.5
    nearest = torch.bucketize(drawn, (levels[1:] + levels[:-1]) / 2)
    means = torch.zeros_like(levels).index_add_(0, nearest, drawn) / nearest.bincount()
    torch.testing.assert_close(means, levels, rtol=0, atol=0.01)


def assert_distortion_of_the_paper(dim, dtype=torch.float32) -> None:
    """Theorem 1 and the bound of theorem 3; near the value of a scalar; less with each bit."""
    states = directions(4096, dim).to(dtype)
    exact, measured = states.double(), []
    for bits in (2, 3, 4):
        method = TurboQuant(bits)
        for decoded in method.decode(method.encode(states, states)):
            assert decoded.dtype == dtype
            measured.append((decoded.double() - exact).square().sum(-1).mean().item())
        assert 4**-bits <= measured[-1] <= math.sqrt(3) * math.pi / 2 * 4**-bits
        assert measured[-1] == measured[-2]
        assert 0.92 * GAUSSIAN[bits] < measured[-1] < 1.04 * GAUSSIAN[bits]
    assert measured == sorted(measured, reverse=True)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distortion(dim, dtype) -> None:
    assert_distortion_of_the_paper(dim, dtype)


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_distortion_notices_a_wrong_codebook(factor, monkeypatch) -> None:
    right = turboquant._codebook
    monkeypatch.setattr(turboquant, "_codebook", lambda *key: right(*key) * factor)
    turboquant._tables.cache_clear()
    try:
        with pytest.raises(AssertionError):
            assert_distortion_of_the_paper(64)
    finally:
        turboquant._tables.cache_clear()


def test_distortion_does_not_depend_on_the_data() -> None:
    """Outlier channels and tokens, which break plain scalar quantization: the rotation."""
    states = random(1, 2048, 128)
    states[..., 5] *= 100
    states[:, ::3] *= 1000
    for bits in (2, 3, 4):
        decoded, _ = TurboQuant(bits).decode(TurboQuant(bits).encode(states, states))
        error = (decoded - states).square().sum(-1) / states.square().sum(-1)
        # Tokens of one outlier channel are nearly one direction: one draw of the rotation.
        assert error.mean() <= math.sqrt(3) * math.pi / 2 * 4**-bits * 1.2


def errors_over_seeds(bits, residual, key, other, seeds=200):
    """<other, decoded key> - <other, key>, [seed, token], of keys [1, P, D]."""
    errors = []
    for seed in range(seeds):
        method = TurboQuant(bits, residual, seed)
        decoded, _ = method.decode(method.encode(key, key[..., :0]))
        errors.append(((decoded - key).double() * other.double()).sum(-1)[0])
    return torch.stack(errors)


@all_bits
def test_residual_makes_inner_products_unbiased(bits) -> None:
    """Theorem 2. Each seed is another rotation and sketch; the bias is along the key itself."""
    key = directions(32, 64)
    errors = errors_over_seeds(bits, True, key, key)
    standard_error = errors.std() / errors.numel() ** 0.5
    assert errors.mean().abs() < 4 * standard_error
    plain = errors_over_seeds(bits, False, key, key)
    assert plain.mean() == pytest.approx(math.sqrt(1 - GAUSSIAN[bits]) - 1, rel=0.08)
    assert plain.mean() < -20 * plain.std() / plain.numel() ** 0.5
    assert plain.mean().abs() > 4 * standard_error, "the test could not see the bias"


@all_bits
def test_variance_of_inner_products(bits) -> None:
    """Theorem 2 and its lower bound; lemma 4: pi / 2D of what one bit less leaves over."""
    dim = 64
    key, other = directions(32, dim), directions(32, dim, seed=1)
    errors = errors_over_seeds(bits, True, key, other)
    assert errors.mean().abs() < 4 * errors.std() / errors.numel() ** 0.5
    variance = errors.square().mean().item() * dim
    assert 4**-bits <= variance <= math.sqrt(3) * math.pi**2 * 4**-bits
    assert variance == pytest.approx(math.pi / 2 * GAUSSIAN[bits - 1], rel=0.1)
