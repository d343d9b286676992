"""Attention over codes is that over the decoded pages, in float64; fewer bits, more error."""

from importlib import import_module

import pytest
import torch
from pikv_kernels import quantized_attention, quantized_attention_reference
from tolerances import OVER_CODES
from variants import (
    DTYPES,
    NAMES,
    NAMES_AND_DIMS,
    PAGE,
    SCALE,
    VARIANTS,
    distance,
    exact_attention,
    fitted,
    sealed,
    states,
)

from pikv_hf.compressors import Compressor, Fp8, Int2, Int4, Int8
from pikv_hf.compressors.integer import Integer
from pikv_hf.storage.codec import flat_tokens


def check_attention(compressor: Compressor, dims, dtype, tokens: int, queries: int = 5) -> None:
    key_dim, value_dim = dims
    keys, values = (states("outlier_channel", 12, PAGE, dim, seed=dim).to(dtype) for dim in dims)
    fields = sealed(compressor, keys, values)
    query = states("", 2, 2, queries, key_dim, seed=7).to(dtype)
    out, lse = compressor.attend(query, fields, tokens, SCALE)
    keys, values = (flat_tokens(pages, tokens) for pages in compressor.decode(fields))
    expected, expected_lse = exact_attention(query, keys, values if value_dim else keys)
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    assert distance(out, expected) <= OVER_CODES[dtype], "output"
    assert (lse - expected_lse).abs().max() <= 4 * OVER_CODES[dtype] * query.norm(dim=-1).max()


@NAMES_AND_DIMS
@DTYPES
@pytest.mark.parametrize("tokens", [48, 41, 1])
def test_attention_reads_codes(name, dtype, dims, tokens) -> None:
    check_attention(fitted(name, dims), dims, dtype, tokens)


@NAMES
@pytest.mark.parametrize("queries", [1, 8, 33])
def test_attention_of_many_queries(name, queries) -> None:
    check_attention(fitted(name), (64, 64), torch.float32, 48, queries)


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if isinstance(c, (Integer, Fp8))])
def test_wrong_scales_are_seen(name, monkeypatch) -> None:
    """The comparison above fails when attention reads the scales of other tokens or channels."""
    compressor = VARIANTS[name]
    numbers, attend = type(compressor)._numbers, type(compressor).attend

    def rolled(self, which, fields):
        read = numbers(self, which, fields)
        axis = -1 if read.is_per_channel else -2 if read.scale.shape[-2] > 1 else -3
        return read._replace(scale=read.scale.roll(1, axis))

    def attend_wrongly(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr(type(compressor), "_numbers", rolled)
            return attend(self, *args)

    monkeypatch.setattr(type(compressor), "attend", attend_wrongly)
    with pytest.raises(AssertionError, match="output"):
        check_attention(compressor, (64, 64), torch.float32, 48)


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if isinstance(c, (Integer, Fp8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_against_its_reference(name, dtype) -> None:
    compressor = VARIANTS[name]
    keys, values = (states("", 12, PAGE, 64, seed=s).to(dtype) for s in range(2))
    fields = sealed(compressor, keys, values)
    query = states("", 2, 2, 5, 64, seed=2).to(dtype)
    read = [compressor._numbers(part, fields) for part in ("key", "value")]
    actual = quantized_attention(query, *read, 41, SCALE)
    expected = quantized_attention_reference(query, *read, 41, SCALE)
    assert distance(actual[0], expected[0]) <= OVER_CODES[dtype]
    assert (actual[1] - expected[1]).abs().max() <= 10 * OVER_CODES[dtype]


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if isinstance(c, (Integer, Fp8))])
@pytest.mark.parametrize("most", [1, 2 * 2 * 48 * 4, 2 * 2 * 48 * 32])
def test_scores_of_a_few_queries_at_a_time(name, most, monkeypatch) -> None:
    """One, four or all but one of 33 queries."""
    monkeypatch.setattr(import_module("pikv_kernels.quantized_attention"), "MAX_SCORES", most)
    check_attention(VARIANTS[name], (64, 64), torch.float32, 48, 33)


def attention_error(compressor: Compressor, kind: str) -> float:
    """Error of the attention output over 1,024 tokens in pages of 64, one KV head, 8 queries."""
    keys, values = states(kind, 64, 64, 128), states("", 64, 64, 128, seed=1)
    query = states("", 2, 2, 8, 128, seed=2)
    if kind != "":  # an outlier channel of a trained model does not drown all others
        query[..., [3, 5]] *= 0.1
    out, _ = compressor.attend(
        query.float(), sealed(compressor, keys.float(), values.float()), 1024, SCALE
    )
    paged_ = (t.unflatten(0, (2, 2, -1)).flatten(2, 3) for t in (keys, values))
    return distance(out, exact_attention(query, *paged_)[0])


@pytest.mark.parametrize("kind", ["", "outlier_channel"])
def test_more_bits_less_error(kind) -> None:
    errors = [attention_error(method(rotate=True), kind) for method in (Int8, Int4, Int2)]
    assert 5 * errors[0] < errors[1] and 2 * errors[1] < errors[2]
    e4m3, e5m2 = (attention_error(Fp8(format), kind) for format in ("e4m3", "e5m2"))
    assert errors[0] < e4m3 < e5m2 < errors[2]


@pytest.mark.parametrize("kind", ["outlier_channel", "shifted_channel"])
def test_rotation_helps_outlier_channels(kind) -> None:
    plain, rotated = (attention_error(Int4(rotate=rotate), kind) for rotate in (False, True))
    assert rotated < plain / 2
    assert attention_error(Int4(key_axis="channel"), kind) < rotated
    assert attention_error(Int4(), "") < 1.02 * attention_error(Int4(rotate=False), "")
