"""The versions of transformers that are supported, under every name that each accepts."""

import importlib.metadata
import runpy
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import SMALL, assert_close, dynamic, tiny
from pikv_kernels import partial_attention
from pikv_kernels.weighted_attention import is_fast_bfloat16
from torch import Tensor, nn
from zoo import prompt

import pikv_hf
from pikv_hf import PiKVCache, requirements
from pikv_hf.model import versions
from pikv_hf.model.versions import CACHE, CACHE_NAMES, cache_in, forward_inputs, with_cache

ROOT = Path(__file__).parents[2]
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")
NAMES = CACHE_NAMES[CACHE_NAMES.index(CACHE) :]  # that the installed transformers accepts
OLD_NAME = "ignore:`past_key_values` is deprecated:FutureWarning"


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says that it is a version that nobody has tried."""
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.0")
    versions.warn_if_untested.cache_clear()


def unsupported() -> str:
    tested = r"\(tested: 5\.17 to 5\.24\)"
    return rf"transformers 5\.99\.0 is not supported by pikv_hf {pikv_hf.__version__} {tested}"


# ---- names ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(OLD_NAME)
@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_takes_a_cache_under_every_name(name: str, argument: str):
    model = tiny(name)
    inputs = prompt(model, (30, 23))
    cache = PiKVCache(model, **SMALL)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True}
    out = model.generate(**inputs, **{argument: cache}, **options)
    assert torch.equal(out.sequences, model.generate(**inputs, max_new_tokens=6))
    assert cache_in(out) is cache
    assert all(getattr(out, name) is cache for name in NAMES)
    assert cache.get_seq_length() == 35


@pytest.mark.filterwarnings(OLD_NAME)
@pytest.mark.parametrize("argument", [*NAMES, "by position"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("part", ["model", "decoder"])
def test_forward_takes_a_cache_under_every_name(name: str, argument: str, part: str):
    model = tiny(name)
    module = model if part == "model" else model.get_decoder()
    ids = prompt(model, (40,))["input_ids"]

    def last(cache: object) -> Tensor:
        for piece in ids.split([20, 19, 1], dim=1):
            if argument == "by position":
                out = module(piece, None, None, cache)
            else:
                out = module(piece, **{argument: cache})
            assert cache_in(out) is cache
        return out[0]

    with torch.no_grad():
        cache = PiKVCache(model, **SMALL)
        assert_close(last(cache), last(dynamic(model)))
    assert cache.get_seq_length() == 40
    assert cache.log.starts(ids), "the ids were noted"


def test_arguments_by_position_have_names():
    decoder = tiny("mixtral").get_decoder()
    given = forward_inputs(decoder, ("ids", "mask", "positions", "cache"), {"use_cache": True})
    names = ["input_ids", "attention_mask", "position_ids", CACHE, "use_cache"]
    assert list(given) == names


def test_the_newest_name_wins_as_in_transformers():
    given = {name: f"under {name}" for name in CACHE_NAMES}
    assert versions.given_cache(given) == f"under {CACHE}"
    assert versions.given_cache({}) is None


@pytest.mark.parametrize("entry", ["forward", "generate"])
def test_a_cache_in_an_argument_that_is_not_read_is_refused(entry: str):
    model = tiny("mixtral")
    cache = PiKVCache(model, **SMALL)
    inputs = prompt(model, (9,)) | with_cache(dynamic(model))
    call = model if entry == "forward" else model.generate
    with pytest.raises(ValueError, match=f"`kv_store` is a PiKVCache, .* reads is `{CACHE}`"):
        call(**inputs, kv_store=cache)


def test_a_transformers_without_any_known_name_is_refused(untested: None):
    with pytest.raises(ImportError, match=unsupported()):
        versions.current_cache_name({"last_hidden_state", "kv_store"})


# ---- versions that nobody has tried -----------------------------------------------------------


class Later(nn.Module):
    """Stands for a model of a later transformers, which calls its cache `kv_store`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model.get_decoder()

    def forward(self, ids: Tensor, kv_store: object) -> Tensor:
        return self.decoder(ids, kv_store=kv_store)[0]


class Nested(Later):
    """Stands for one that passes its cache inside of something else."""

    def forward(self, ids: Tensor, kv_store: object) -> Tensor:
        def unpack(module, args, kwargs):
            return args, kwargs | {CACHE: kwargs.pop("nested")["cache"]}

        with self.decoder.register_forward_pre_hook(unpack, with_kwargs=True):
            return self.decoder(ids, nested={"cache": kv_store})[0]


@pytest.mark.filterwarnings("ignore:transformers 5.99")
@pytest.mark.parametrize("later", [Later, Nested])
def test_an_untested_version_that_renames_the_cache_is_named(untested: None, later: type[Later]):
    model = tiny("mixtral")
    with PiKVCache(model, **SMALL) as cache:
        with pytest.raises((ValueError, RuntimeError), match=unsupported()):
            later(model)(prompt(model, (9,))["input_ids"], cache)
        assert cache.get_seq_length() == 0


@pytest.mark.filterwarnings("ignore:transformers 5.99")
def test_an_untested_version_that_calls_no_attention_function_is_named(
    untested: None, monkeypatch: pytest.MonkeyPatch
):
    model = tiny("mixtral")
    with PiKVCache(model, **SMALL) as cache:
        for layer in model.get_decoder().layers:  # modules that do not look their function up
            monkeypatch.setattr(
                layer.self_attn.config, "_attn_implementation_internal", "eager", raising=True
            )
        with pytest.raises(RuntimeError, match=unsupported()):
            model(**prompt(model, (9,)), **with_cache(cache))


def test_attaching_to_an_untested_version_warns_once(untested: None):
    model = tiny("mixtral")
    with pytest.warns(UserWarning, match=unsupported()):
        PiKVCache(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PiKVCache(model)


def test_attaching_to_a_tested_version_does_not_warn():
    versions.warn_if_untested.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PiKVCache(tiny("mixtral"))


# ---- private operators of torch that a version lacks ------------------------------------------


def test_without_the_fused_attention_the_reference_runs(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 7, 16, generator=generator)
    fused = partial_attention(query, key, value, None, 0.25)
    monkeypatch.setattr(import_module("pikv_kernels.fused_attention"), "_flash_cpu", None)
    reference = partial_attention(query, key, value, None, 0.25)
    for ours, theirs in zip(reference, fused, strict=True):
        assert_close(ours, theirs)


def test_without_its_probe_bfloat16_counts_as_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not is_fast_bfloat16(torch.zeros(1, dtype=torch.bfloat16))


# ---- versions that are too old ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "installed", "needed"),
    [("torch", "2.10.0+cpu", "2.11"), ("transformers", "4.57.6", "5.17")],
)
def test_old_packages_are_refused_at_import(
    package: str, installed: str, needed: str, monkeypatch: pytest.MonkeyPatch
):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: installed if name == package else real(name)
    )
    with pytest.raises(ImportError, match=f"needs {package} {needed} or newer, but {package}"):
        runpy.run_path(requirements.__file__)


def test_an_old_python_is_refused_at_import(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(ImportError, match=r"needs Python 3\.10 or newer, but Python 3\.9 is"):
        runpy.run_path(requirements.__file__)


def test_pyproject_states_the_same_ranges():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    major, newest = requirements.NEWEST_TRANSFORMERS
    oldest = requirements.dotted(requirements.OLDEST_TRANSFORMERS)
    for line in (
        f'"transformers>={oldest},<{major}.{newest + 1}"',
        f'"torch>={requirements.dotted(requirements.OLDEST_TORCH)}"',
        f'requires-python = ">={requirements.dotted(requirements.OLDEST_PYTHON)}"',
        f'version = "{pikv_hf.__version__}"',
    ):
        assert line in project
