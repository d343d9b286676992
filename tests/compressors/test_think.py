"""`think`: which key channels stay, and what the others cost."""

import pytest
import torch
from helpers import (
    FAMILIES,
    ONE_ROW,
    PADDED,
    SMALL,
    assert_same,
    dynamic,
    generate,
    paged,
    spans_of,
    tiny,
)
from torch import Tensor
from transformers import PreTrainedConfig
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Pyramid, ThinK
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SEEDS = pytest.mark.parametrize("seed", range(3))


def random_pages(seed: int, dim: int = 32, queries: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [2, 3, 4, 16, D], and queries [2, 3, Q, D] that prefer some channels."""
    generator = torch.Generator().manual_seed(seed)
    shape = 2, 3, 4, 16, dim
    keys, values = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    keys *= torch.rand(2, 3, 4, 1, dim, generator=generator, dtype=torch.float64) * 2
    asked = torch.randn(2, 3, queries, dim, generator=generator, dtype=torch.float64)
    return keys, values, asked * torch.rand(2, 3, 1, dim, generator=generator) ** 3


@DTYPES
@pytest.mark.parametrize("dims", [(32, 32), (24, 16), (300, 8)], ids=str)
def test_ratio_0_is_exact(dtype, dims) -> None:
    keys, values = (random_pages(0, dim)[0].to(dtype) for dim in dims)
    method = ThinK(ratio=0)
    for fields in (
        method.encode(keys, values),
        method.encode_observed(keys, values, keys[:, :, 0, :3]),
    ):
        decoded = method.decode(fields)
        assert torch.equal(decoded[0], keys) and torch.equal(decoded[1], values)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
def test_ratio_0_of_a_model_gives_its_tokens(name, lengths) -> None:
    model = tiny(name)
    inputs = prompt(model, lengths)
    expected = generate(model, inputs, dynamic(model))
    assert_same(generate(model, inputs, PiKVCache(model, compressor=ThinK(0), **SMALL)), expected)


@SEEDS
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.9])
def test_channels_are_those_of_the_largest_products(seed, ratio) -> None:
    """Of the Frobenius norms of Q_j K_j^T, one outer product after the other."""
    keys, values, asked = random_pages(seed)
    fields = ThinK(ratio).encode_observed(keys, values, asked)
    kept = int(32 * (1 - ratio) + 1e-9)
    assert fields["channels"].shape[-1] == fields["kept_keys"].shape[-1] == kept
    for row, head, page in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        norms = torch.stack(
            [
                torch.outer(asked[row, head, :, j], keys[row, head, page, :, j]).norm()
                for j in range(32)
            ]
        )
        best = norms.topk(kept).indices.sort().values
        assert fields["channels"][row, head, page].tolist() == best.tolist()
        mine = keys[row, head, page][:, best]
        assert torch.equal(fields["kept_keys"][row, head, page], mine)


def test_padding_does_not_count_and_every_query_head_does() -> None:
    keys, values, asked = random_pages(0)
    method = ThinK(0.5)
    channels = method.encode_observed(keys, values, asked)["channels"]
    padded = torch.cat([asked, torch.zeros_like(asked)], dim=2)
    assert torch.equal(method.encode_observed(keys, values, padded)["channels"], channels)
    half = method.encode_observed(keys, values, asked[:, :, :6])["channels"]
    assert not torch.equal(half, channels)


@SEEDS
def test_queries_that_were_seen_lose_less(seed) -> None:
    """Scores of new queries like the observed ones, against channels of the largest keys alone."""
    keys, values, asked = random_pages(seed, queries=40)
    old, new = asked[:, :, :32], asked[:, :, None, 32:]
    method = ThinK(0.5)
    errors = []
    for fields in (method.encode_observed(keys, values, old), method.encode(keys, values)):
        errors.append((new @ (method.decode(fields)[0] - keys).mT).norm())
    assert errors[0] < 0.8 * errors[1]


def test_bytes_fall_with_the_ratio() -> None:
    keys, values, asked = (t.bfloat16() for t in random_pages(0))
    sizes = []
    for ratio in (0, 0.2, 0.4, 0.6, 0.8):
        fields = ThinK(ratio).encode_observed(keys, values, asked)
        nbytes = sum(t.numel() * t.element_size() for t in fields.values()) / keys[..., 0].numel()
        assert nbytes == pytest.approx(ThinK(ratio).bytes_per_token(32, 32, 2, page_size=16))
        sizes.append(nbytes)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert sizes[-1] < 0.65 * sizes[0]


def test_a_model_attends_to_what_is_left() -> None:
    """The channels of a cache are those of the queries of its own layer, its keys those of the model."""
    model = tiny("mixtral")
    inputs = prompt(model, ONE_ROW)
    with PiKVCache(model, compressor=ThinK(0.5), **SMALL) as cache, torch.no_grad():
        model(**inputs, **with_cache(cache))
        full = dynamic(model)
        model(**inputs, **with_cache(full))
        for layer, exact in zip(paged(cache), full.layers, strict=True):
            (span,) = spans_of(layer, [0])
            original = exact.keys[:, :, : len(span)]
            kept = span["keys"] != 0
            assert (kept.sum(-1) == original.shape[-1] // 2).all()
            assert torch.equal(span["keys"][kept], original[kept])
            assert torch.equal(span["values"], exact.values[:, :, : len(span)])


def test_a_scheduler_keeps_the_same_tokens() -> None:
    model = tiny("mixtral")
    inputs, options = prompt(model, PADDED), {"scheduler": StreamingLLM(sinks=2), "budget": 16}
    held = []
    for compressor in (ThinK(0.5), None):
        cache = PiKVCache(model, compressor=compressor, **SMALL, **options)
        generate(model, inputs, cache)
        held.append([layer.state.held_tokens() for layer in paged(cache)])
    assert held[0] == held[1]


@SEEDS
@pytest.mark.parametrize("is_observed", [True, False], ids=["observed", "unseen"])
def test_of_latents_the_rotary_part_is_pruned(seed, is_observed) -> None:
    """As keys of their own, by the rotary part of the queries; the rest stays, and is the value."""
    keys, _, asked = random_pages(seed)
    method = ThinK(0.5).bind(PreTrainedConfig(qk_rope_head_dim=12), 0)
    alone, rotary = ThinK(0.5), keys[..., 20:]
    if is_observed:
        fields = method.encode_observed(keys, keys[..., :0], asked)
        expected = alone.encode_observed(rotary, rotary, asked[..., 20:])
    else:
        fields, expected = method.encode(keys, keys[..., :0]), alone.encode(rotary, rotary)
    decoded, values = method.decode(fields)
    assert values.shape == (*keys.shape[:-1], 0)
    assert torch.equal(decoded[..., :20], keys[..., :20])
    assert torch.equal(decoded[..., 20:], alone.decode(expected)[0])
    nbytes = sum(t.numel() * t.element_size() for t in fields.values()) / keys[..., 0].numel()
    assert nbytes == pytest.approx(method.bytes_per_token(32, 0, 8, page_size=16))
    assert nbytes < 8 * 32


def test_latents_of_a_model() -> None:
    """Half of the rotary part of what it caches is gone, and nothing else."""
    model = tiny("deepseek_v3")
    rank, inputs = model.config.kv_lora_rank, prompt(model, ONE_ROW)
    with PiKVCache(model, compressor=ThinK(0.5), **SMALL) as cache, torch.no_grad():
        model(**inputs, **with_cache(cache))
        lossless = PiKVCache(model, **SMALL)
        model(**inputs, **with_cache(lossless))
        for layer, exact in zip(paged(cache), paged(lossless), strict=True):
            ((span,), (original,)) = (each.state.pages.spans([0]) for each in (layer, exact))
            assert torch.equal(span["keys"][..., :rank], original["keys"][..., :rank])
            rotary, original = (each["keys"][..., rank:] for each in (span, original))
            kept = rotary != 0
            assert (kept.sum(-1) == rotary.shape[-1] // 2).all()
            assert torch.equal(rotary[kept], original[kept])


def test_latents_of_which_nothing_is_known_are_refused() -> None:
    match = "latents .MLA. are keys and values at once, apart from a rotary part"
    keys, _, asked = random_pages(0)
    with pytest.raises(ValueError, match=match):
        ThinK().encode_observed(keys, keys[..., :0], asked)
    with pytest.raises(ValueError, match=match):
        PiKVCache(tiny("deepseek_v3"), compressor=Pyramid(tiers=(ThinK(),), shares=(1.0,)))


@pytest.mark.parametrize("ratio", [1, -0.1, True, "half", None, float("nan")])
def test_wrong_ratios(ratio) -> None:
    with pytest.raises(ValueError, match=r"`ratio` is .*; it must be a number in \[0, 1\)"):
        ThinK(ratio)
