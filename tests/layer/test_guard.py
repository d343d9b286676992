"""The guard: silent where pages keep what matters, one warning with measured advice where not."""

import re
import warnings

import pytest
import torch
from helpers import ONE_ROW, SMALL, Scattered, forward, paged, tiny
from torch import Tensor
from variants import calibrated
from zoo import build, prompt

from pikv_hf import COMPRESSORS, LossWarning, PiKVCache
from pikv_hf.compressors import Fp8, Identity, Int2, Int4, Int8, Svd, TurboQuant
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.loss_guard import LIMIT, MAX_PAGES
from pikv_hf.schedulers import StreamingLLM
from pikv_hf.storage.page_table import PageTable

DIM, PAGE, WINDOW = 64, 32, 16
SILENT = [Identity(), Int8(), Int8(rotate=True), Int8(symmetric=False), Fp8(), Fp8("e5m2"), Int4()]
SILENT += [Int4(symmetric=False), Int4(key_axis="channel"), TurboQuant(), TurboQuant(bits=3)]
LOUD = [Int4(rotate=False), Int2(), Int2(key_axis="channel"), TurboQuant(bits=2), Svd(rank=4)]
LOUD += [TurboQuant(bits=4, residual=True), Int4(rotate=False, group_size=DIM)]


def tokens(kind: str, count: int = 8 * PAGE + WINDOW, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [1, 2, count, DIM]; `outliers`: 4 key channels 10 times as large."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, count, DIM, generator=generator)
    if kind == "outliers":
        keys[..., [3, 17, 40, 41]] *= 10
    return keys, values


def cache_of(compressor, **options) -> PiKVCache:
    model = build("mixtral", head_dim=DIM)
    return PiKVCache(model, compressor=compressor, page_size=PAGE, window=WINDOW, **options)


def write(cache: PiKVCache, keys: Tensor, values: Tensor, layer_idx: int = 1) -> list[str]:
    """Give a layer tokens; the guard's warnings."""
    layer = paged(cache)[layer_idx]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.update(keys, values)
        assert take_layer() is layer
        layer.finish()
    return [str(w.message) for w in caught if w.category is LossWarning]


def losses(compressor, keys: Tensor, values: Tensor) -> tuple[float, float]:
    """Relative root mean square errors of keys and values, over whole pages of all of them."""
    pages = [t[:, :, : 8 * PAGE].unflatten(2, (8, PAGE)) for t in (keys, values)]
    decoded = compressor.decode(compressor.encode(*pages))
    both = zip(decoded, pages, strict=True)
    return tuple(((d - p).double().norm() / p.double().norm()).item() for d, p in both)


# ---- when it speaks -----------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", SILENT, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_silent(compressor, kind, dtype) -> None:
    keys, values = (t.to(dtype) for t in tokens(kind))
    assert write(cache_of(compressor), keys, values) == []


@pytest.mark.parametrize("compressor", LOUD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loud(compressor, dtype) -> None:
    """It names the layer, what is lost and how much: what all pages lose, up to sampling."""
    keys, values = (t.to(dtype) for t in tokens("outliers"))
    (message,) = write(cache_of(compressor), keys, values)
    assert message.startswith(f"layer 1: {compressor.title} changes ")
    found = {name: float(n) for name, n in re.findall(r"(keys|values) by ([\d.]+)", message)}
    lost = dict(zip(("keys", "values"), losses(compressor, keys, values), strict=True))
    assert found.keys() == {name for name, loss in lost.items() if loss > LIMIT}
    for name, loss in found.items():
        assert loss == pytest.approx(lost[name], rel=0.1)
    assert f"more than {LIMIT}: try " in message


@pytest.mark.parametrize("compressor", LOUD, ids=str)
def test_advice_helps(compressor) -> None:
    """Each compressor that it names loses less, as much as it says, and is silent itself."""
    keys, values = tokens("outliers")
    (message,) = write(cache_of(compressor), keys, values)
    advice = re.findall(r"compressor=(\w+\(.*?\)) \(([\d.e-]+)\)", message)
    assert advice and advice[-1][0] == "Int8()"
    known = {cls.__name__: cls for cls in (Int2, Int4, Int8, Fp8, Svd, TurboQuant)}
    before = losses(compressor, keys, values)
    parts = [i for i, loss in enumerate(before) if loss > LIMIT]
    for code, said in advice:
        other = eval(code, known)
        left = max(losses(other, keys, values)[part] for part in parts)
        assert left < LIMIT < max(before)
        assert float(said) == pytest.approx(left, rel=0.1)
        assert write(cache_of(other), keys, values) == []


def test_advice_is_rotation_or_channels_or_bits() -> None:
    (message,) = write(cache_of(Int4(rotate=False)), *tokens("outliers"))
    assert "compressor=Int4() (" in message
    assert "compressor=Int4(key_axis='channel', rotate=False) (" in message
    assert "compressor=Int8() (" in message
    (message,) = write(cache_of(TurboQuant(bits=2)), *tokens("normal"))
    assert "compressor=TurboQuant(bits=3) (" in message


def test_advice_that_head_dims_forbid_is_not_given() -> None:
    model = build("mixtral", head_dim=20)
    cache = PiKVCache(model, compressor=TurboQuant(bits=2), page_size=PAGE, window=WINDOW)
    keys, values = (t[..., :20] for t in tokens("normal"))
    (message,) = write(cache, keys, values)
    assert "TurboQuant" not in message and "compressor=Int8() (" in message


@pytest.mark.parametrize("part", ["keys", "values"])
def test_keys_and_values_are_judged_apart(part) -> None:
    keys, values = tokens("normal")
    (keys if part == "keys" else values)[..., [3, 17, 40, 41]] *= 10
    (message,) = write(cache_of(Int4(rotate=False)), keys, values)
    assert re.findall(r"(keys|values) by", message) == [part]


class Mixed(Scattered):
    """Pages of int8 and of int2, half and half."""

    @property
    def members(self):
        return Int8(), Int2()


def test_mixed_pages() -> None:
    assert len(write(cache_of(Mixed()), *tokens("normal"))) == 1


CASES = [(name, model) for name in COMPRESSORS for model in ("mixtral", "deepseek_v3")]


@pytest.mark.parametrize("name, model_name", CASES)
def test_every_compressor_in_a_model(name, model_name) -> None:
    """At most once a layer, in prefill and decoding; latents are keys without values."""
    model = tiny(model_name)
    cache = PiKVCache(model, compressor=calibrated(name, model), **SMALL)
    ids = prompt(model, ONE_ROW)["input_ids"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start, end in ((0, 20), (20, 21), (21, 29)):
            forward(model, ids[:, start:end], torch.ones(1, end, dtype=torch.int64), cache)
    said = [str(w.message) for w in caught if w.category is LossWarning]
    layers = [re.match(r"layer (\d+)", message)[1] for message in said]
    assert len(set(layers)) == len(layers)
    if name in ("int8", "int4", "fp8", "identity"):
        assert not said
    if name == "int2":
        assert len(said) == len(paged(cache))
        assert all(("values" in message) == (model_name == "mixtral") for message in said)


# ---- how often ----------------------------------------------------------------------------------


def test_once_a_layer() -> None:
    cache = cache_of("int2")
    for layer_idx in (0, 1):
        said = []
        for seed in range(20):
            said += write(cache, *tokens("normal", PAGE, seed), layer_idx)
        assert len(said) == 1 and said[0].startswith(f"layer {layer_idx}:")
    cache.reset()
    assert write(cache, *tokens("normal")) == []


def test_it_looks_when_tokens_have_doubled_and_at_few_pages(monkeypatch) -> None:
    apart, looked = PageTable.apart, []
    cache = cache_of("int4")
    layer = paged(cache)[1]

    def spy(self, span, queries=None):
        looked.append(
            (layer.state.num_departed[0], span["keys"].shape[0] * span["keys"].shape[1] * len(span))
        )
        return apart(self, span, queries)

    monkeypatch.setattr(PageTable, "apart", spy)
    for seed in range(40):
        write(cache, *tokens("normal", PAGE, seed))
    assert [at // PAGE + 1 for at, _ in looked] == [1, 2, 4, 8, 16, 32]
    looked.clear()
    cache.reset()
    write(cache, *(t.expand(3, -1, -1, -1) for t in tokens("normal", 100 * PAGE)))
    assert [numbers for _, numbers in looked] == [MAX_PAGES * PAGE]


def test_what_comes_later_is_seen() -> None:
    """Keys that become hard to store after a harmless beginning."""
    cache = cache_of(Int4(rotate=False))
    assert write(cache, *tokens("normal")) == []
    said = []
    for seed in range(9):
        said += write(cache, *tokens("outliers", PAGE, seed))
    assert len(said) == 1


def test_all_of_a_prompt_is_sampled() -> None:
    """Keys that become so in the second half of one prompt."""
    (keys, values), (late, _) = tokens("normal"), tokens("outliers")
    keys[:, :, 4 * PAGE :] = late[:, :, 4 * PAGE :]
    assert len(write(cache_of(Int4(rotate=False)), keys, values)) == 1


def test_a_lossless_cache_is_not_looked_at(monkeypatch) -> None:
    monkeypatch.setattr(PageTable, "apart", lambda *args: pytest.fail("looked at"))
    assert write(cache_of(None), *tokens("outliers")) == []
    assert write(cache_of(None, scheduler=StreamingLLM(4, 64)), *tokens("outliers")) == []


def test_zeros_are_no_loss() -> None:
    assert write(cache_of("int2"), *(torch.zeros_like(t) for t in tokens("normal"))) == []


def test_it_can_be_silenced() -> None:
    cache = cache_of("int2")
    layer = paged(cache)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=LossWarning)
        layer.update(*tokens("normal"))
        assert take_layer() is layer
        layer.finish()
    assert layer.state.guard.has_warned


def test_it_survives_as_an_error() -> None:
    """With warnings as errors it is the error, not a damaged cache."""
    layer = paged(cache_of("int2"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LossWarning)
        layer.update(*tokens("normal"))
        assert take_layer() is layer
        with pytest.raises(LossWarning, match="layer 0: int2 changes"):
            layer.finish()
