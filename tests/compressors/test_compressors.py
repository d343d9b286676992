"""Every compressor of the registry, and the options of ours: what comes back of a page."""

import pytest
import torch
from helpers import SMALL, paged, tiny
from tolerances import NEAREST_CODE
from variants import (
    DTYPES,
    LOSSY,
    NAMES,
    NAMES_AND_DIMS,
    PAGE,
    REDUCED,
    VARIANTS,
    distance,
    fitted,
    states,
)

from pikv_hf import PiKVCache
from pikv_hf.compressors import Fp8, Int2, Int4, Int8
from pikv_hf.compressors.integer import Integer

# ---- one page -----------------------------------------------------------------------------------


@NAMES_AND_DIMS
@DTYPES
def test_pages_come_back(name, dtype, dims) -> None:
    """Shape, dtype and basis are the original ones, the error is one that the bytes explain."""
    compressor = fitted(name, dims)
    keys, values = (states("", 1, 2, 3, PAGE, dim, seed=dim).to(dtype) for dim in dims)
    before = keys.clone(), values.clone()
    decoded = compressor.decode(compressor.encode(keys, values))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])
    bits = 8 * VARIANTS[name].bytes_per_token(128, 128, 2, 64) / 256 if name not in REDUCED else 0
    for original, states_ in zip((keys, values), decoded, strict=True):
        assert states_.dtype == dtype and states_.shape == original.shape
        if original.shape[-1] and name not in REDUCED:  # random numbers have no low rank
            assert distance(states_, original) <= min(16 * 2**-bits, 0.6)


@pytest.mark.parametrize("kind", ["", "outlier_channel", "shifted_channel", "outlier_token"])
@pytest.mark.parametrize("kind_of_scale", ["token", "groups", "channel", "asymmetric"])
@pytest.mark.parametrize("method", [Int8, Int4])
@DTYPES
def test_integer_error(method, kind_of_scale, kind, dtype) -> None:
    """Half a step of the scale that reaches the largest number; a fitted one clips at the most a
    quarter of it; besides, rounding of the dtype."""
    options = {
        "token": {},
        "groups": {"group_size": 8},
        "channel": {"key_axis": "channel"},
        "asymmetric": {"symmetric": False},
    }[kind_of_scale]
    keys = states(kind, 6, PAGE, 64).to(dtype)
    compressor = method(rotate=False, **options)
    decoded = compressor.decode(compressor.encode(keys, keys))[0].double()
    exact = keys.double()
    grouped = exact.unflatten(-1, (-1, 8)) if kind_of_scale == "groups" else exact
    axis = 1 if kind_of_scale == "channel" else -1
    high, low = grouped.amax(axis, True), grouped.amin(axis, True)
    largest = (high - low) / 2 if kind_of_scale == "asymmetric" else high.maximum(-low)
    rounding = 3 * torch.finfo(dtype).eps * exact.abs().amax()
    error = (decoded - exact).abs().view(grouped.shape)
    bound = largest / 254 if method is Int8 else largest * 0.26
    assert (error <= bound + rounding).all()
    squared = error.square().mean(axis, True)
    step = largest / (127 if method is Int8 else 7.5)
    assert (squared <= (step / 2 + rounding).square() + rounding**2).all()
    if kind == "" and dtype == torch.float32:  # these are not the original numbers
        assert squared.mean() > (step.mean() / 8) ** 2


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("kind", ["zero", "tiny"])
@DTYPES
def test_zero_and_tiny_numbers(name, kind, dtype) -> None:
    keys = states(kind, 4, PAGE, 64).to(dtype).unflatten(0, (1, 2, 2))
    compressor = fitted(name)
    decoded = compressor.decode(compressor.encode(keys, keys))
    for states_ in decoded:
        assert states_.isfinite().all()
        if name in REDUCED:
            continue
        assert distance(states_, keys) <= 0.6
        if kind == "zero" and name != "int2_channel_asymmetric":
            per_token = not (name.endswith("channel") and states_ is decoded[0])
            assert not per_token or (states_[..., ::2, :] == 0).all()


@pytest.mark.parametrize("name", ["int8", "int8_rotated", "int4", "int4_groups", "int2", "fp8"])
@DTYPES
def test_encoding_again_changes_nothing(name, dtype) -> None:
    """A scheduler decodes pages to drop tokens, and seals the rest again: errors may not add up."""
    compressor = VARIANTS[name]
    keys = states("", 4, PAGE, 128).to(dtype)
    once = compressor.decode(compressor.encode(keys, keys))[0]
    again = once
    for _ in range(20):
        again = compressor.decode(compressor.encode(again.flip(1), again.flip(1)))[0].flip(1)
    assert distance(again, once) <= 100 * torch.finfo(dtype).eps
    assert distance(again, keys) <= 1.01 * distance(once, keys)


# ---- many pages ---------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("rows", [1, 9])
def test_many_pages_of_a_longer_tensor(name, rows) -> None:
    """They are encoded a few at a time, from tokens that do not lie together: as each page alone."""
    compressor = fitted(name)
    keys, values = (states("", rows, 2, 22 * PAGE, 64, seed=s).float() for s in range(2))
    keys, values = (t[:, :, 3 : 3 + 21 * PAGE].unflatten(2, (21, PAGE)) for t in (keys, values))
    together = compressor.decode(compressor.encode(keys, values))
    for page in range(21):
        alone = (t[:, :, page : page + 1].contiguous() for t in (keys, values))
        for one, all_ in zip(compressor.decode(compressor.encode(*alone)), together, strict=True):
            assert distance(all_[:, :, page : page + 1].double(), one.double()) < NEAREST_CODE


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, match",
    [
        (Int4, {"symmetric": "yes"}, "`symmetric` is 'yes'; it must be True or False"),
        (Int4, {"rotate": None}, "`rotate` is None; it must be True or False"),
        (Int8, {"key_axis": "head"}, r"`key_axis` is 'head'.*'token', 'channel'"),
        (Int2, {"group_size": 0}, "`group_size` is 0; it must be a positive whole number"),
        (Int2, {"group_size": 1.5}, "`group_size` is 1.5"),
        (Fp8, {"format": "e3m4"}, r"`format` is 'e3m4'.*'e4m3', 'e5m2'"),
    ],
)
def test_wrong_options(method, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        method(**options)


@pytest.mark.parametrize(
    "compressor, dim, match",
    [
        (
            Int4(group_size=48),
            64,
            "`group_size` of int4 is 48, which does not divide the key dim 64",
        ),
        (Int4(), 33, "int4 packs 2 numbers into a byte, but the key dim is 33; use int8"),
        (Int2(), 66, "int2 packs 4 numbers into a byte, but the key dim is 66"),
    ],
)
def test_wrong_head_dims(compressor, dim, match) -> None:
    keys = states("", 2, PAGE, dim)
    with pytest.raises(ValueError, match=match):
        compressor.encode(keys, keys)


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if isinstance(c, (Integer, Fp8))])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_numbers_without_a_code(name, bad, part) -> None:
    """NaN and infinity are refused when a page is sealed, by layer and compressor."""
    model = tiny("mixtral")
    cache = PiKVCache(model, compressor=VARIANTS[name], **SMALL)
    layer = paged(cache)[1]
    pair = [states("", 1, 2, 16, 16).float() for _ in range(2)]
    pair[part][0, 1, 5, 3] = bad
    title = name.partition("_")[0]
    match = f"layer {layer.state.layer_idx}: {title} cannot store {['key', 'value'][part]}s that are NaN"
    layer.update(*pair)
    with pytest.raises(ValueError, match=match):
        layer.finish()
    cache.reset()
