"""Variants of each compressor, numbers to encode, and attention in float64."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from zoo import prompt

from pikv_hf import COMPRESSORS
from pikv_hf.compressors import Compressor, Fp8, Int2, Int4, Int8, MixedCompressor, Svd
from pikv_hf.compressors.moments import Moments
from pikv_hf.fitting.calibrate import calibrate
from pikv_hf.fitting.calibration_job import METHODS, Job

# They encode no page themselves: their members do, in caches.
MIXED = {n: method() for n, method in COMPRESSORS.items() if issubclass(method, MixedCompressor)}

VARIANTS: dict[str, Compressor] = {
    **{name: method() for name, method in COMPRESSORS.items() if name not in MIXED},
    "int8_rotated": Int8(rotate=True),
    "int8_asymmetric": Int8(symmetric=False),
    "int4_plain": Int4(rotate=False),
    "int4_groups": Int4(group_size=8),
    "int4_asymmetric_groups": Int4(symmetric=False, group_size=16),
    "int4_channel": Int4(key_axis="channel"),
    "int2_channel_asymmetric": Int2(key_axis="channel", symmetric=False),
    "fp8_e5m2": Fp8(format="e5m2"),
    "svd": Svd(rank=3),  # with its default it loses nothing in the short pages of these tests
}

# They keep a part of what there is: of random numbers, no error follows from the bytes.
REDUCED = ("svd", "think", *METHODS)
NAMES = pytest.mark.parametrize("name", VARIANTS)
LOSSY = [name for name in VARIANTS if name != "identity"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
DIMS = [(64, 64), (80, 80), (96, 96), (192, 128), (128, 64), (576, 0)]
PAGE, SCALE = 16, 0.11
NAMES_AND_DIMS = pytest.mark.parametrize(
    "name, dims",
    [pytest.param(name, dims, id=f"{name}-{dims}") for name in VARIANTS for dims in DIMS],
)


def states(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, with what real keys have besides."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "outlier_channel" and shape[-1]:
        out[..., 5] *= 20
    if kind == "shifted_channel":
        out[..., 3] += 30
    if kind == "outlier_token":
        out[:, 3] *= 1000
    if kind == "tiny":
        out *= 1e-3
    if kind == "zero":
        out[:, ::2] = 0
    return out


@functools.cache
def fitted(name: str, dims: tuple[int, int] = (64, 64), heads: int = 2) -> Compressor:
    """The variant `name` for keys and values of `dims`; a calibrated one as if it had been trained."""
    if name not in METHODS:
        return VARIANTS[name].bind(PreTrainedConfig(qk_rope_head_dim=64), 0)
    generator, factors = torch.Generator().manual_seed(3), {}
    for part, dim in zip(("key", "value"), dims, strict=True):
        if dim:
            numbers = torch.randn(heads, 500, dim, generator=generator)
            free = METHODS[name].initial(Moments.of(numbers), dim // 4, generator)
            free = {
                k: t + 0.02 * torch.randn(t.shape, generator=generator) for k, t in free.items()
            }
            made = METHODS[name].constrained(free)
            factors |= {f"{part}_{k}": tensor for k, tensor in made.items()}
    return VARIANTS[name].with_factors(factors)


@functools.cache
def calibrated(name: str, model) -> Compressor:
    """The variant `name` for whole models: with a calibration, if it needs one."""
    if name not in METHODS:
        return (VARIANTS | MIXED)[name]
    return METHODS[name](calibration=calibration(model))


@functools.cache
def calibration(model) -> Path:
    job = Job(length=64, windows=2, steps=3)
    ids = prompt(model, (3 * job.piece_tokens,), seed=5)["input_ids"]
    path = Path(tempfile.mkdtemp()) / "cal.safetensors"
    calibrate(model, ids.split(job.piece_tokens, dim=1), path, job)
    return path


def sealed(compressor: Compressor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Pages [2, 2, s, ...] of `keys` [2 * 2 * s, P, D]."""
    keys, values = (t.unflatten(0, (2, 2, -1)) for t in (keys, values))
    fields = compressor.encode(keys, values)
    assert {tensor.shape[:3] for tensor in fields.values()} == {keys.shape[:3]}
    return fields


def exact_attention(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    scores = query.double() @ keys.double().mT * SCALE
    return scores.softmax(-1) @ values.double(), scores.logsumexp(-1)


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
