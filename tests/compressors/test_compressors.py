"""Every compressor of the registry, and the options of ours, against float64 on decoded pages."""

import functools
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    FEW_LAYERS,
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    forward,
    generate,
    paged,
    slabs_of,
    tiny,
)
from pikv_kernels import (
    hadamard,
    hadamard_reference,
    pack_codes,
    quantized_attention,
    quantized_attention_reference,
    read_float8,
    read_float8_reference,
    unpack_codes,
    unpack_codes_reference,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from zoo import build, prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.compressors import Compressor, Fp8, Int2, Int4, Int8, MixedCompressor, Svd
from pikv_hf.compressors.integer import Integer
from pikv_hf.compressors.moments import Moments
from pikv_hf.fitting.calibrate import calibrate
from pikv_hf.fitting.calibration_job import METHODS, Job
from pikv_hf.layer.handoff import take_layer
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM
from pikv_hf.storage.codec import encoded, flat_tokens
from pikv_hf.storage.page_table import PageTable

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
# Attention over codes against float64 over the decoded pages: output relative to its norm, and LSE.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}
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


# ---- attention over codes ---------------------------------------------------------------------


def check_attention(compressor: Compressor, dims, dtype, tokens: int, queries: int = 5) -> None:
    key_dim, value_dim = dims
    keys, values = (states("outlier_channel", 12, PAGE, dim, seed=dim).to(dtype) for dim in dims)
    fields = sealed(compressor, keys, values)
    query = states("", 2, 2, queries, key_dim, seed=7).to(dtype)
    out, lse = compressor.attend(query, fields, tokens, SCALE)
    keys, values = (flat_tokens(pages, tokens) for pages in compressor.decode(fields))
    expected, expected_lse = exact_attention(query, keys, values if value_dim else keys)
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    assert distance(out, expected) <= TOLERANCE[dtype], "output"
    assert (lse - expected_lse).abs().max() <= 4 * TOLERANCE[dtype] * query.norm(dim=-1).max()


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
    assert distance(actual[0], expected[0]) <= TOLERANCE[dtype]
    assert (actual[1] - expected[1]).abs().max() <= 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if isinstance(c, (Integer, Fp8))])
@pytest.mark.parametrize("most", [1, 2 * 2 * 48 * 4, 2 * 2 * 48 * 32])
def test_scores_of_a_few_queries_at_a_time(name, most, monkeypatch) -> None:
    """One, four or all but one of 33 queries."""
    monkeypatch.setattr(import_module("pikv_kernels.quantized_attention"), "MAX_SCORES", most)
    check_attention(VARIANTS[name], (64, 64), torch.float32, 48, 33)


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
            assert distance(all_[:, :, page : page + 1].double(), one.double()) < 3e-3


class LargestCopy(TorchDispatchMode):
    """The bytes of the largest tensor that was made in float32."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pages", [32, 256])
def test_copies_are_small_beside_the_codes(name, pages) -> None:
    """Freed between codes that stay, larger ones leave holes in the heap."""
    keys, values = (states("", 1, 4, pages, 64, 128, seed=s).bfloat16() for s in range(2))
    compressor = fitted(name, (128, 128), heads=4)
    with LargestCopy() as largest:
        fields = compressor.encode(keys, values)
    assert 0 < largest.nbytes <= fields["key_codes"].nbytes / 4


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


# ---- the operations ---------------------------------------------------------------------------


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
    assert torch.allclose(hadamard(x), hadamard_reference(x), atol=1e-12)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-12)
    assert torch.allclose(hadamard(x) @ hadamard(y).mT, x @ y.mT, atol=1e-11)


# ---- bytes --------------------------------------------------------------------------------------

BOUNDS = {"int8": 1.04, "int4": 0.54, "int2": 0.30, "fp8": 1.04, "identity": 2.0}


def sealed_bytes(cache: PiKVCache) -> tuple[int, int]:
    """Bytes of the encoded pages of the first layer, and how many tokens they hold."""
    slabs = slabs_of(paged(cache)[0])
    tensors = [tensor for slab in slabs for tensor in slab.fields.values()]
    assert all(slab.length == slab.capacity for slab in slabs)
    return sum(t.untyped_storage().nbytes() for t in tensors), sum(slab.length for slab in slabs)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_in_a_cache(name, dtype) -> None:
    """Storage of the pages of a real cache: as the formula says, and within the bounds."""
    model = build("mixtral", dtype=dtype, num_hidden_layers=1, head_dim=128)
    cache = PiKVCache(model, compressor=calibrated(name, model), window=64)
    with torch.no_grad():
        model(prompt(model, (512 + 64,))["input_ids"], **with_cache(cache))
    nbytes, tokens = sealed_bytes(cache)
    assert tokens == 512
    heads = model.config.num_key_value_heads
    formula = paged(cache)[0].state.pages.codec.bytes_per_token(128, 128, dtype.itemsize, 64)
    assert nbytes / tokens / heads == pytest.approx(formula, rel=0.03)
    if name in BOUNDS and (dtype == torch.bfloat16 or name != "identity"):
        assert nbytes / tokens / heads / 256 <= BOUNDS[name]


@NAMES
def test_bytes_of_latents(name) -> None:
    keys = states("", 1, 1, 4, 64, 576).bfloat16()
    compressor = fitted(name, (576, 0), heads=1)
    fields = compressor.encode(keys, keys[..., :0])
    measured = sum(t.numel() * t.element_size() for t in fields.values()) / (4 * 64)
    assert measured == pytest.approx(compressor.bytes_per_token(576, 0, 2, 64), rel=0.03)


# ---- whole models -------------------------------------------------------------------------------


class Asked:
    """The queries that the layers of a cache gave its pages, in turn: `PageTable.append` is watched.

    They are known by layer, batch row and the last column of the sealed tokens.
    """

    def __init__(self, monkeypatch) -> None:
        self.tables: dict[PageTable, dict[tuple[int, int], list[Tensor]]] = {}
        append = PageTable.append

        def watched(table, span, rows, batch, queries=None, *rest):
            if queries is not None:
                mine = self.tables.setdefault(table, {})
                for number, row in enumerate(rows):
                    seals = mine.setdefault((row, int(span["positions"].max())), [])
                    seals.append(queries[number : number + 1])
            return append(table, span, rows, batch, queries, *rest)

        monkeypatch.setattr(PageTable, "append", watched)

    def of(self, cache: PiKVCache) -> dict[int, dict[tuple[int, int], list[Tensor]]]:
        return {
            layer.state.layer_idx: self.tables.get(layer.state.pages, {}) for layer in paged(cache)
        }


@pytest.fixture
def asked(monkeypatch) -> Asked:
    return Asked(monkeypatch)


def decoded(compressor: Compressor, keys: Tensor, values: Tensor, queries: Tensor | None):
    """What pages [R, H, S, P, D] are after they were encoded, by members for a mixed compressor."""
    if not isinstance(compressor, MixedCompressor):
        return compressor.decode(encoded(compressor, keys, values, queries))
    choice = compressor.assign(keys, values, queries)[..., None, None]
    found = [decoded(member, keys, values, queries) for member in compressor.members]
    for number, (keys_, values_) in enumerate(found):
        keys = torch.where(choice == number, keys_, keys)
        values = torch.where(choice == number, values_, values)
    return keys, values


class Sealing(DynamicLayer):
    """A DynamicLayer that, after each forward, encodes and decodes what a page would hold by then.

    `hidden` [B] are the left-padded columns of each row, which enter no page; `asked` the queries
    of each seal, by row and last column.
    """

    page_size, window = SMALL["page_size"], SMALL["window"]

    def __init__(self, compressor: Compressor, is_latent: bool, hidden: list[int], asked) -> None:
        super().__init__()
        self.compressor, self.is_latent, self.hidden = compressor, is_latent, hidden
        self.asked = asked
        self.sealed = 0

    def update(self, key_states, value_states, *args, **kwargs):
        seen = super().update(key_states, value_states, *args, **kwargs)
        before = [tensor.clone() for tensor in seen]
        count = (self.get_seq_length() - self.sealed - self.window) // self.page_size
        end = self.sealed + max(count, 0) * self.page_size
        for row in range(len(self.keys)):
            start = max(self.sealed, self.hidden[row % len(self.hidden)])
            if start < end:
                self._seal(row, start, end)
        self.sealed = end
        return tuple(before)

    def _seal(self, row: int, start: int, end: int) -> None:
        states_ = [t[row, :, start:end] for t in (self.keys, self.values)]
        if self.is_latent:
            states_ = [torch.cat(states_, dim=-1), states_[0][..., :0]]
        missing = -(end - start) % self.page_size
        pages = [
            torch.nn.functional.pad(t, (0, 0, 0, missing)).unflatten(1, (-1, self.page_size))
            for t in states_
        ]
        queries = self.asked[row, end - 1].pop(0) if self.compressor.observed_queries else None
        found = decoded(self.compressor, *(t[None] for t in pages), queries)
        states_ = [t[0].flatten(1, 2)[:, : end - start] for t in found]
        if self.is_latent:
            states_ = states_[0].split([self.keys.shape[-1], self.values.shape[-1]], dim=-1)
        self.keys[row, :, start:end], self.values[row, :, start:end] = states_

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.sealed = min(self.sealed, self.get_seq_length())


def sealing(model, name: str, compressor: Compressor, lengths, asked):
    """A cache of the model whose pages are decoded at once; `asked` of one that ran before."""
    cache = dynamic(model)
    hidden = [max(lengths) - length for length in lengths]
    for idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            bound = compressor.bind(model.config, idx)
            is_latent = name == "deepseek_v3"
            cache.layers[idx] = Sealing(bound, is_latent, hidden, asked.get(idx, {}))
    return cache


@functools.cache
@functools.cache
def exact_model(name: str):
    """In float64, where no rounding error moves a number to the next code; none may change it."""
    attn = "eager" if name == "gpt_oss" else "sdpa"
    model = build(name, attn, dtype=torch.float64, **FEW_LAYERS.get(name, {}))
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model


CASES = [
    (name, model)
    for name in VARIANTS | MIXED
    for model in (
        ["mixtral", "deepseek_v3", "gpt_oss", "jamba"] if name in COMPRESSORS else ["mixtral"]
    )
]
REGISTERED = pytest.mark.parametrize(
    "name, model_name",
    [case for case in CASES if case[1] in ("mixtral", "deepseek_v3") and case[0] in COMPRESSORS],
)


@pytest.mark.parametrize("name, model_name", CASES)
@pytest.mark.parametrize("lengths", [(29,), PADDED], ids=["one_row", "left_padded"])
def test_generation(name, model_name, lengths, asked) -> None:
    """Tokens and logits of a model whose own cache holds the decoded pages."""
    model = exact_model(model_name)
    inputs = prompt(model, lengths)
    cache = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    actual = generate(model, inputs, cache)
    oracle = sealing(model, model_name, calibrated(name, model), lengths, asked.of(cache))
    expected = generate(model, inputs, oracle)
    assert_same(actual, expected)
    assert_sealed_in_prefill_and_decode(cache, max(lengths))
    if name != "identity":
        exact = generate(model, inputs, dynamic(model))
        assert (expected.logits[1:] - exact.logits[1:]).abs().max() > 1e-3, "nothing was quantized"


@REGISTERED
def test_beams(name, model_name, asked) -> None:
    model = exact_model(model_name)
    inputs = prompt(model, (27,))
    cache = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    options = {"num_beams": 3, "do_sample": False}
    actual = generate(model, inputs, cache, **options)
    oracle = sealing(model, model_name, calibrated(name, model), (27,), asked.of(cache))
    assert_same(actual, generate(model, inputs, oracle, **options))


@REGISTERED
@pytest.mark.parametrize("removed", [2, 11])
def test_crop(name, model_name, removed, asked) -> None:
    """Of the tail alone and into pages; what stays is not encoded again."""
    model = exact_model(model_name)
    ids = prompt(model, (40,))["input_ids"]
    ours = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    logits = []
    for is_ours in (True, False):
        cache = ours
        if not is_ours:
            given = asked.of(ours)
            cache = sealing(model, model_name, calibrated(name, model), (40,), given)
        forward(model, ids[:, :30], torch.ones(1, 30, dtype=torch.int64), cache)
        cache.crop(-removed)
        steps = [
            forward(model, ids[:, at : at + 1], torch.ones(1, at + 1, dtype=torch.int64), cache)
            for at in range(30 - removed, 40)
        ]
        logits.append(torch.cat(steps, dim=1))
    assert_close(logits[0], logits[1])


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8"])
def test_pages_are_encoded_once(name) -> None:
    """Codes do not drift while tokens are added."""
    model = tiny("mixtral")
    ids = prompt(model, (90,))["input_ids"]
    cache = PiKVCache(model, compressor=name, **SMALL)
    with torch.no_grad():
        model(ids[:, :24], **with_cache(cache))
        codes = slabs_of(paged(cache)[1])[0].fields["key_codes"][:, :, :5].clone()
        for token in ids[:, 24:].split(1, dim=1):
            model(token, **with_cache(cache))
    assert torch.equal(slabs_of(paged(cache)[1])[0].fields["key_codes"][:, :, :5], codes)


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_what_a_scheduler_keeps_is_not_changed_again(name) -> None:
    """The oldest tokens, in pages that were decoded and sealed again many times."""
    model = tiny("mixtral")
    keys, values = states("", 2, 1, 2, 80, 16).float()
    options = {"compressor": name, "page_size": 4, "window": 8}
    held = []
    for scheduler in (None, StreamingLLM(sinks=6, window=20)):
        layer = paged(PiKVCache(model, scheduler=scheduler, **options))[0]
        for at in range(0, 80, 4):
            layer.update(keys[:, :, at : at + 4], values[:, :, at : at + 4])
            assert take_layer() is layer
            layer.finish(None)
        spans = [slab.span([0], with_values=True) for slab in slabs_of(layer)]
        held.append(torch.cat([span["values"] for span in spans], dim=2)[:, :, :6])
    assert distance(held[1], held[0]) < 1e-5
    assert distance(held[1], values[:, :, :6]) > 1e-3


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
        layer.finish(None)
    cache.reset()
