"""TurboQuant: the distortion that its paper proves (arXiv 2504.19874), and attention over codes."""

import hashlib
import inspect
import math
import subprocess
import sys

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    assert_close,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    forward,
    generate,
    tiny,
    two_layers,
)
from pikv_kernels import look_up, look_up_reference, pack_indices, word_table
from torch.nn.functional import normalize
from transformers.cache_utils import DynamicLayer
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Int4, Pyramid, TurboQuant, turboquant
from pikv_hf.schedulers import StreamingLLM

# Least mean squared errors of a scalar quantizer of N(0, 1) (Max, 1960); the paper rounds them to
# 0.36, 0.117, 0.03 and 0.009 (after theorem 1). On a sphere of finite dim they are a little less.
GAUSSIAN = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
all_bits = pytest.mark.parametrize("bits", [2, 3, 4])
all_variants = pytest.mark.parametrize("residual", [False, True], ids=["mse", "residual"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def directions(count, dim, seed=0):
    """[1, count, dim] on the unit sphere, float32."""
    return normalize(random(1, count, dim, seed=seed), dim=-1)


# ---- the codebook -------------------------------------------------------------------------------


@all_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_levels_are_looked_up(bits, dtype) -> None:
    indices = torch.randint(0, 2**bits, (3, 5, 24), generator=torch.Generator().manual_seed(0))
    levels = random(2**bits, dtype=dtype)
    packed = pack_indices(indices, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 3 * bits)
    looked_up = look_up(packed, word_table(levels, bits), bits, dtype)
    assert torch.equal(looked_up, look_up_reference(packed, levels, bits))
    assert torch.equal(looked_up, levels[indices])


def test_codebook_of_a_large_dim_is_that_of_max() -> None:
    """J. Max, Quantizing for minimum distortion, 1960, table I."""
    expected = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    for bits, upper in expected.items():
        levels = turboquant._codebook(bits, 2**14)
        half = torch.tensor(upper, dtype=levels.dtype)
        torch.testing.assert_close(levels, torch.cat([-half.flip(0), half]), rtol=1e-3, atol=0)


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


# ---- distortion ---------------------------------------------------------------------------------


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


# ---- inner products -----------------------------------------------------------------------------


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


# ---- one page -----------------------------------------------------------------------------------


@all_bits
@all_variants
@pytest.mark.parametrize("dims", [(128, 128), (80, 96), (96, 80), (576, 0)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_attend(bits, residual, dims, dtype, tolerance) -> None:
    """Attention in float64 over the decoded tokens, in their own basis."""
    rows, heads, pages, size, tokens = 2, 2, 3, 16, 39
    method = TurboQuant(bits, residual)
    states = [random(rows * heads * pages, size, dim, seed=dim, dtype=dtype) for dim in dims]
    encoded = method.encode(*states)
    fields = {k: v.view(rows, heads, pages, *v.shape[1:]) for k, v in encoded.items()}
    query, scale = random(rows, heads, 5, dims[0], seed=9, dtype=dtype), dims[0] ** -0.5
    out, lse = method.attend(query, fields, tokens, scale)

    widened = {k: v.double() if v.is_floating_point() else v for k, v in fields.items()}
    decoded = [t.flatten(2, 3)[:, :, :tokens].double() for t in method.decode(widened)]
    keys, values = decoded if dims[1] else (decoded[0], decoded[0])
    scores = query.double() @ keys.transpose(-1, -2) * scale
    expected = scores.softmax(-1) @ values
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        lse.double(), scores.logsumexp(-1), rtol=tolerance / 3, atol=tolerance / 3
    )
    other_basis, _ = TurboQuant(bits, residual, seed=1).attend(query, fields, tokens, scale)
    assert (other_basis.double() - expected).abs().max() > 5 * tolerance


@all_bits
@all_variants
@pytest.mark.parametrize("dims", [(128, 128), (80, 96), (576, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(bits, residual, dims, dtype) -> None:
    method = TurboQuant(bits, residual)
    keys, values = (random(5, 16, dim, dtype=dtype) for dim in dims)
    before = keys.clone()
    fields = method.encode(keys, values)
    measured = sum(t.nbytes for t in fields.values()) / (5 * 16)
    assert measured == method.bytes_per_token(*dims, dtype.itemsize, 64)
    norms = 1 + residual + (dims[1] > 0)
    assert measured == sum(dims) * bits / 8 + norms * dtype.itemsize
    assert {len(t) for t in fields.values()} == {5}
    assert torch.equal(keys, before)


@all_bits
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_encoding_decoded_pages_changes_nothing(bits, dtype, tolerance) -> None:
    """A scheduler that drops tokens encodes those that stay with new neighbours, time and again."""
    states = random(4, 64, 64, dtype=dtype)
    first = TurboQuant(bits).encode(states, states)
    fields = first
    for _ in range(50):
        fields = TurboQuant(bits).encode(*TurboQuant(bits).decode(fields))
    assert torch.equal(fields["key_codes"], first["key_codes"])
    norms, before = fields["key_norms"], first["key_norms"]
    torch.testing.assert_close(norms, before, rtol=tolerance, atol=0)
    decoded = TurboQuant(bits).decode(first)[0].float().norm(dim=-1)
    torch.testing.assert_close(decoded, states.float().norm(dim=-1), rtol=1e-2, atol=0)


@all_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_tokens(residual, dtype) -> None:
    """Zeros stay zeros; a norm that float16 could not hold is stored as root mean square."""
    states = random(1, 4, 64, dtype=torch.float32).clamp(-3, 3)
    states[:, 0] = 0
    states[:, 1] *= 2e4
    states[:, 2] *= 1e-4
    method = TurboQuant(4, residual)
    keys, values = method.decode(method.encode(states.to(dtype), states.to(dtype)))
    for decoded, most in ((keys, 0.1), (values, 0.02)):
        assert not decoded[:, 0].any()
        error = (decoded.double() - states).square().sum(-1)[:, 1:]
        assert (error <= most * states.double().square().sum(-1)[:, 1:]).all()


# ---- nothing but configuration ------------------------------------------------------------------


def digest() -> str:
    """Of encoded pages, whatever the process was set to."""
    states = torch.arange(32 * 80, dtype=torch.float32).square().sin().view(1, 32, 80)
    torch.set_default_dtype(torch.float16)
    try:
        fields = TurboQuant(3, True).encode(states, states)
    finally:
        torch.set_default_dtype(torch.float32)
    pages = [t.bfloat16().float() if t.is_floating_point() else t for t in fields.values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in pages)).hexdigest()


def test_reproducible_across_processes() -> None:
    torch.manual_seed(1)
    imports = "import hashlib, torch\nfrom pikv_hf.compressors import TurboQuant\n"
    script = f"{imports}{inspect.getsource(digest)}\nprint(digest())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert other.stdout.decode().strip() == digest()


def test_caches_are_usable_outside_of_inference_mode() -> None:
    for cached in (turboquant._basis, turboquant._tables, turboquant._codebook):
        cached.cache_clear()
    method, keys = TurboQuant(3, True), random(2, 8, 40)
    with torch.inference_mode():
        method.decode(method.encode(keys, keys))
    fields = {k: v[None, :, None] for k, v in method.encode(keys, keys).items()}
    query = random(1, 2, 3, 40).requires_grad_()
    method.attend(query, fields, 8, 0.2)[0].sum().backward()
    assert query.grad.abs().max() > 0


@pytest.mark.parametrize(
    "wrong", [{"bits": 5}, {"bits": 2.0}, {"bits": True}, {"residual": 1}, {"seed": -1}], ids=str
)
def test_wrong_options_are_refused(wrong) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(wrong))}` is"):
        TurboQuant(**wrong)


def test_dims_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="the value dim is 20"):
        TurboQuant(3).encode(random(1, 4, 24), random(1, 4, 20))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="keys that are NaN"):
        TurboQuant().encode(random(1, 4, 16) * math.nan, random(1, 4, 16))


# ---- the whole path -----------------------------------------------------------------------------


class FakeQuantized(DynamicLayer):
    """A DynamicLayer that returns decoded tokens where a paged layer has sealed them."""

    method, is_latent, sealed = TurboQuant(), False, 0

    def update(self, key_states, value_states, *args, **kwargs):
        self.sealed = min(self.sealed, self.get_seq_length())
        states = super().update(key_states, value_states, *args, **kwargs)
        old = [s[:, :, : self.sealed] for s in states]
        dims = [s.shape[-1] for s in states]
        if self.is_latent:  # latent and rotary key are one key
            old = [torch.cat(old, dim=-1), old[1][..., :0]]
        shape = old[0].shape[:3]
        decoded = self.method.decode(self.method.encode(*(s.flatten(0, 1) for s in old)))
        old = [s.unflatten(0, shape[:2]) for s in decoded]
        if self.is_latent:
            old = old[0].split(dims, dim=-1)
        full = [torch.cat([o, s[:, :, self.sealed :]], 2) for o, s in zip(old, states, strict=True)]
        excess = states[0].shape[2] - self.sealed - SMALL["window"]
        self.sealed += max(excess // SMALL["page_size"], 0) * SMALL["page_size"]
        return full


def quantized_dynamic(model, name, method):
    cache = dynamic(model)
    for idx, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[idx] = FakeQuantized()
            cache.layers[idx].is_latent = name == "deepseek_v3"
            cache.layers[idx].method = method
    return cache


METHODS = {"4": TurboQuant(), "3": TurboQuant(3, seed=1), "residual": TurboQuant(4, True)}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(name, method, mode) -> None:
    """Left-padded rows; against a default cache that holds the same decoded tokens."""
    model = two_layers(name)
    inputs = prompt(model, PADDED, seed=1)  # with seed 0 two beams are 2e-6 apart: a tie
    cache = PiKVCache(model, compressor=method, **SMALL)
    expected = generate(model, inputs, quantized_dynamic(model, name, method), **mode)
    assert_same(generate(model, inputs, cache, **mode), expected)
    if not mode:
        assert_sealed_in_prefill_and_decode(cache, max(PADDED))
        exact = generate(model, inputs, dynamic(model))
        assert (expected.logits[1:] - exact.logits[1:]).abs().max() > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("removed", [3, 13], ids=["in_the_tail", "in_pages"])
def test_crop(name, removed) -> None:
    model, method = tiny(name), TurboQuant(3)
    ids = prompt(model, (40, 40))["input_ids"]
    mask = torch.ones_like(ids)
    logits = []
    for cache in (
        PiKVCache(model, compressor=method, **SMALL),
        quantized_dynamic(model, name, method),
    ):
        forward(model, ids[:, :26], mask[:, :26], cache)
        forward(model, ids[:, 26:28], mask[:, :28], cache)
        cache.crop(-removed)
        steps = range(28 - removed, 40)
        logits.append(
            torch.cat([forward(model, ids[:, i : i + 1], mask[:, : i + 1], cache) for i in steps])
        )
    assert_close(*logits)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_under_a_scheduler(name) -> None:
    """One that drops nothing, but takes all pages out and seals them again.

    With more bits a vector of these 16 dims now and then gets another code; one of 64 does not.
    """
    model, method = tiny(name), TurboQuant(2)
    inputs = prompt(model, PADDED, seed=1)
    cache = PiKVCache(model, compressor=method, scheduler=StreamingLLM(), **SMALL)
    expected = generate(model, inputs, quantized_dynamic(model, name, method))
    assert_same(generate(model, inputs, cache), expected)


def test_wrong_codebook_shows_in_the_logits(monkeypatch) -> None:
    """The control of the tests above: pages read with another codebook than the oracle's."""
    model, method = tiny("mixtral"), TurboQuant()
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, quantized_dynamic(model, "mixtral", method))
    tables = turboquant._tables
    monkeypatch.setattr(turboquant, "_tables", lambda bits, dim, *rest: tables(bits, 576, *rest))
    with pytest.raises(AssertionError):
        assert_same(generate(model, inputs, PiKVCache(model, compressor=method, **SMALL)), expected)


def test_the_sketch_is_refused_where_pages_differ() -> None:
    """A scheduler would make it anew each time, for pages that may change their encoding."""
    model, mixed = tiny("mixtral"), Pyramid((TurboQuant(residual=True), Int4()), (0.5, 0.5))
    with pytest.raises(ValueError, match="cannot be encoded again"):
        PiKVCache(model, compressor=mixed, scheduler="streaming_llm")
    PiKVCache(model, compressor=mixed).detach()
    PiKVCache(model, compressor=TurboQuant(residual=True), scheduler="streaming_llm").detach()
