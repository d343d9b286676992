"""TurboQuant: one page, attention over its codes, its bytes; only configuration matters."""

import hashlib
import inspect
import subprocess
import sys

import pytest
import torch
from directions import all_bits, all_variants, random
from pikv_kernels import look_up, look_up_reference, pack_indices, word_table
from tolerances import NORM_OF_CODES, OVER_CODES, ROUNDED

from pikv_hf.compressors import TurboQuant, turboquant

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


# ---- one page -----------------------------------------------------------------------------------


@all_bits
@all_variants
@pytest.mark.parametrize("dims", [(128, 128), (80, 96), (96, 80), (576, 0)], ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance", [(dtype, OVER_CODES[dtype]) for dtype in (torch.float32, torch.bfloat16)]
)
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
@pytest.mark.parametrize(
    "dtype, tolerance", [(dtype, ROUNDED[dtype]) for dtype in (torch.float32, torch.bfloat16)]
)
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
    torch.testing.assert_close(decoded, states.float().norm(dim=-1), rtol=NORM_OF_CODES, atol=0)


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
