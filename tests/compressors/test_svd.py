"""`svd` against the singular values of the same pages, in float64."""

import pytest
import torch
from helpers import forward, paged, slabs_of, tiny
from pikv_kernels import lowrank_attention, lowrank_attention_reference
from tolerances import FACTORS_AT_THE_END, FLOAT64, LOGITS, ROUNDED
from torch import Tensor
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Svd
from pikv_hf.layer.handoff import take_layer
from pikv_hf.schedulers import StreamingLLM

# Tokens of a page and dims: fewer, as many, and more.
SHAPES = [(16, 64), (64, 16), (32, 32), (7, 33)]
DTYPES = pytest.mark.parametrize(
    "dtype, rounding",
    [
        (dtype, ROUNDED[dtype])
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ],
    ids=str,
)


def random_pages(tokens: int, dim: int, seed: int, decay: float = 1.0) -> Tensor:
    """Pages [2, 3, 2, P, D] whose singular values fall by `decay` from one to the next, or less."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(2, 3, 2, tokens, dim, generator=generator, dtype=torch.float64)
    return pages * decay ** torch.arange(dim)


def back(rank: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    method = Svd(rank=rank)
    return method.decode(method.encode(keys, values))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5])
def test_error_is_the_tail_of_the_singular_values(shape, rank, dtype, rounding) -> None:
    pages = [random_pages(*shape, seed, 0.9).to(dtype) for seed in range(2)]
    for original, near in zip(pages, back(rank, *pages), strict=True):
        assert near.dtype == dtype
        exact = original.double()
        tail = torch.linalg.svdvals(exact)[..., rank:].norm(dim=-1)
        error = (near.double() - exact).norm(dim=(-2, -1))
        size = exact.norm(dim=(-2, -1))
        assert ((error - tail).abs() <= rounding * size).all()
        assert (tail > 0.1 * size).all(), "the error is not that of rounding"


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_is_exact(shape, dtype, rounding) -> None:
    pages = [random_pages(*shape, seed).to(dtype) for seed in range(2)]
    for original, near in zip(pages, back(max(shape), *pages), strict=True):
        assert (near - original).abs().max() <= rounding * original.abs().max()


def test_full_rank_of_a_model_gives_its_logits() -> None:
    model = tiny("mixtral")
    ids = prompt(model, (60,))["input_ids"]
    logits = []
    for compressor in (Svd(rank=16), None):
        with PiKVCache(model, compressor=compressor, page_size=8, window=4) as cache:
            forward(model, ids[:, :40], torch.ones(1, 40), cache)
            logits.append(forward(model, ids[:, 40:], torch.ones(1, 60), cache))
    assert (logits[0] - logits[1]).abs().max() < LOGITS


def test_pages_that_have_a_low_rank_lose_nothing() -> None:
    keys = random_pages(32, 64, 0)[..., :4] @ random_pages(4, 64, 1)
    near = back(4, keys, keys)
    assert (near[0] - keys).abs().max() < FLOAT64


def test_pages_do_not_share_a_basis() -> None:
    """What stands in one page does not change another."""
    keys = random_pages(16, 32, 0)
    other = keys.clone()
    other[0, 0, 0] *= 100
    first, second = (back(4, states, states)[0] for states in (keys, other))
    assert torch.equal(first[1], second[1]) and torch.equal(first[0, 0, 1], second[0, 0, 1])
    assert not torch.equal(first[0, 0, 0], second[0, 0, 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 6, 99])
def test_bytes(shape, rank) -> None:
    keys = random_pages(*shape, 0).bfloat16()
    values = random_pages(shape[0], 24, 1).bfloat16()
    fields = Svd(rank=rank).encode(keys, values)
    measured = sum(t.nbytes for t in fields.values()) / keys[..., 0].numel()
    assert measured == pytest.approx(Svd(rank=rank).bytes_per_token(shape[1], 24, 2, shape[0]))


@DTYPES
@pytest.mark.parametrize("tokens", [1, 40, 96])
def test_attention_against_its_reference(dtype, rounding, tokens) -> None:
    key, value = (
        (random_pages(16, 5, seed).to(dtype), random_pages(5, dim, seed + 2).to(dtype))
        for seed, dim in ((0, 64), (1, 48))
    )
    key, value = ([t.repeat(1, 1, 3, 1, 1) for t in pair] for pair in (key, value))
    query = random_pages(3, 64, 9)[:, :, 0].to(dtype)
    actual = lowrank_attention(query, key, value, tokens, 0.1)
    expected = lowrank_attention_reference(query, key, value, tokens, 0.1)
    assert actual[0].shape == (2, 3, 3, 48) and actual[1].shape == (2, 3, 3)
    assert (actual[0] - expected[0]).norm() <= 3 * rounding * expected[0].norm()
    assert (actual[1] - expected[1]).abs().max() <= 3 * rounding * expected[1].abs().max()


def test_what_a_scheduler_moves_to_other_pages() -> None:
    """Tokens of several pages are sealed together again: the error grows, but not much."""
    model = tiny("mixtral")
    keys, values = (random_pages(80, 16, seed, 0.8)[:1, :2, 0].float() for seed in range(2))
    errors = []
    for scheduler in (None, StreamingLLM(sinks=3, window=42)):
        options = {"compressor": Svd(rank=4), "scheduler": scheduler}
        with PiKVCache(model, **options, page_size=8, window=8) as cache:
            layer = paged(cache)[0]
            for at in range(0, 80, 8):
                layer.update(keys[:, :, at : at + 8], values[:, :, at : at + 8])
                assert take_layer() is layer
                layer.finish()
            spans = [slab.span([0], with_values=True) for slab in slabs_of(layer)]
            places = torch.cat([span["positions"][0, 0] for span in spans]).long()
            near = torch.cat([span["values"] for span in spans], dim=2)
            exact = values.index_select(2, places)
            errors.append(((near - exact).norm() / exact.norm()).item())
    assert errors[0] < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("rank", [0, -3, 1.5, True, "8"])
def test_wrong_rank(rank) -> None:
    with pytest.raises(ValueError, match="`rank` is .*; it must be a positive whole number"):
        Svd(rank=rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_without_a_decomposition(bad) -> None:
    keys = random_pages(16, 32, 0)
    keys[0, 1, 1, 3, 2] = bad
    with pytest.raises(ValueError, match="svd cannot store values that are NaN or infinite"):
        Svd().encode(keys.nan_to_num(0, 0, 0), keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, size",
    [(torch.float16, 6e4), (torch.float16, 1e-6), (torch.float32, 1e30), (torch.float32, 1e-30)],
)
def test_neither_factor_leaves_the_dtype(shape, dtype, size) -> None:
    """A token of 64 dims is 8 times as long as its largest number, which a factor need not hold."""
    pages = random_pages(*shape, 0).clamp(-1, 1).mul(size).to(dtype)
    fields = Svd(rank=max(shape)).encode(pages, pages)
    assert all(field.dtype == dtype and field.isfinite().all() for field in fields.values())
    near = Svd(rank=max(shape)).decode(fields)[0].double()
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((near - pages).abs() <= FACTORS_AT_THE_END * pages.double().abs().max() + step).all()
