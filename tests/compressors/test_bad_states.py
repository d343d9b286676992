"""Keys and values that a compressor cannot store: refused by name, before anything is lost."""

import pytest
import torch
from helpers import ONE_ROW, SMALL, Scattered, dynamic, generate, paged, slabs_of, tiny
from test_bad_arguments import assert_untouched
from variants import calibrated
from zoo import build, prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.compressors import Identity, Int2, Int4, Int8, TurboQuant
from pikv_hf.model.head_dims import head_dims
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM


class Both(Scattered):
    """Pages of int2 and of the identity."""

    @property
    def members(self):
        return Int2(), Identity()


# ---- head dims, when the cache is made ----------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "mimo_v2_flash", "gpt_oss", "jamba"])
def test_head_dims_are_known_beforehand(name) -> None:
    """Those of a model's attention modules are the ones that it caches then."""
    model = build(name, "eager")
    cache = PiKVCache(model)
    expected = [head_dims(modules[0]) for _, modules in sorted(cache.binding.attention.items())]
    generate(model, prompt(model, ONE_ROW), cache)
    for dims, layer in zip(expected, paged(cache), strict=True):
        assert dims == (layer.state.tail.keys.shape[3], layer.state.tail.values.shape[3])


@pytest.mark.parametrize(
    "compressor, head_dim, match",
    [
        (Int4(group_size=48), 64, "`group_size` of int4 is 48, .* the key dim 64; it must be"),
        (Int8(group_size=12), 32, "`group_size` of int8 is 12, .* the key dim 32; it must be"),
        (Int2(), 18, "int2 packs 4 numbers into a byte, but the key dim is 18; use int8 or fp8"),
        (TurboQuant(bits=3), 20, "packs 8 numbers of 3 bits together, but the key dim is 20"),
        (Both(), 18, "int2 packs 4 numbers into a byte, but the key dim is 18"),
    ],
    ids=str,
)
def test_head_dims_that_do_not_suit(compressor, head_dim, match) -> None:
    model = build("mixtral", head_dim=head_dim)
    with pytest.raises(ValueError, match=match):
        PiKVCache(model, compressor=compressor)
    assert_untouched(model)


def test_dims_of_latents_that_do_not_suit() -> None:
    model = tiny("deepseek_v3")
    latent = sum(head_dims(PiKVCache(model).binding.attention[0][0]))
    size = next(size for size in range(2, latent) if latent % size)
    with pytest.raises(ValueError, match=f"`group_size` of int8 is {size}, .* key dim {latent};"):
        PiKVCache(model, compressor=Int8(group_size=size))
    PiKVCache(model, compressor=Int8(group_size=latent))


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 5, 8, 2.5, "4", None])
def test_bits_that_are_not_offered(bits) -> None:
    with pytest.raises(ValueError, match=r"`bits` is .*; it must be one of \[.*2.*3.*4.*\]"):
        TurboQuant(bits=bits)


@pytest.mark.parametrize("name", ["int1", "int3", "int5", "int16"])
def test_integers_that_are_not_offered(name) -> None:
    with pytest.raises(ValueError, match=f"`compressor` is '{name}'; it must be one of .*'int8'"):
        PiKVCache(tiny("mixtral"), compressor=name)


# ---- NaN and infinities -------------------------------------------------------------------------


def write(cache: PiKVCache, bad: float, part: int) -> None:
    """16 tokens into layer 1, of which one number of key (0) or value (1) is `bad`."""
    layer = paged(cache)[1]
    states = [torch.randn(1, 2, 16, 16) for _ in range(2)]
    states[part][0, 1, 5, 3] = bad
    layer.update(*states)
    layer.finish()


@pytest.mark.parametrize("name", [name for name in COMPRESSORS if name != "identity"] + ["both"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_nan_and_infinity_name_the_layer(name, bad, part) -> None:
    model = tiny("mixtral")
    compressor = Both() if name == "both" else calibrated(name, model)
    cache = PiKVCache(model, compressor=compressor, **SMALL)
    match = f"layer 1: {compressor.title} cannot store {['key', 'value'][part]}s that are NaN"
    with pytest.raises(ValueError, match=match):
        write(cache, bad, part)
    cache.reset()
    write(cache, 1.0, part)


@pytest.mark.parametrize("scheduler", ["knorm", "h2o"])
@pytest.mark.parametrize("compressor", ["int8", "svd"])
def test_nan_names_the_layer_where_tokens_are_dropped(scheduler, compressor) -> None:
    model = tiny("mixtral")
    cache = PiKVCache(model, scheduler=scheduler, budget=8, compressor=compressor, **SMALL)
    write(cache, 1.0, 0)
    with pytest.raises(ValueError, match=f"layer 1: {compressor} cannot store keys that are NaN"):
        write(cache, float("nan"), 0)


def test_nan_is_kept_where_nothing_is_encoded() -> None:
    cache = PiKVCache(tiny("mixtral"), scheduler=StreamingLLM(2, 12), **SMALL)
    write(cache, float("nan"), 0)
    cache = PiKVCache(tiny("mixtral"), **SMALL)
    write(cache, float("nan"), 0)
    assert paged(cache)[1].states()[0].isnan().sum() == 1


# ---- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_autocast_mixes_the_dtypes_of_keys_and_values(name) -> None:
    """float32 keys beside bfloat16 values: the wider dtype is cached, as DynamicCache does."""
    model = build(name)
    ids = prompt(model, ONE_ROW)["input_ids"]
    logits, caches = [], [dynamic(model), PiKVCache(model, **SMALL)]
    for cache in caches:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(ids[:, :-1], **with_cache(cache))
            logits.append(model(ids[:, -1:], **with_cache(cache)).logits.float())
    assert (logits[1] - logits[0]).norm() < 0.03 * logits[0].norm()
    assert {layer.state.tail.values.dtype for layer in paged(caches[1])} == {torch.float32}
    assert all(slabs_of(layer) for layer in paged(caches[1]))
