"""Pages live where accelerate runs their layer, wherever the weights are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from helpers import PADDED, SMALL, assert_same, assert_sealed_in_prefill_and_decode, dynamic, paged
from helpers import generate as generate_with
from zoo import build, prompt

from pikv_hf import PiKVCache

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")
OPTIONS = [{}, {"num_beams": 2}, {"prefill_chunk_size": 7}]


def mixed(model, folder):
    """Every second decoder layer on disk, everything else on the CPU."""
    count = model.config.num_hidden_layers
    device_map = {"model.layers." + str(i): "disk" if i % 2 else "cpu" for i in range(count)}
    device_map |= {name: "cpu" for name, _ in model.named_children() if name != "model"}
    device_map |= {
        f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"
    }
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


HOW = {
    "cpu_offload": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "dispatch_to_cpu_and_disk": mixed,
}


def is_offloaded(model) -> bool:
    return any(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("first", ["dispatch", "attach"])
def test_offloaded(name, how, first, tmp_path) -> None:
    """Weights on meta until a layer runs, the latent up-projection among them."""
    model = build(name)
    inputs = prompt(model, PADDED)
    expected = [generate_with(model, inputs, dynamic(model), **options) for options in OPTIONS]
    cache = PiKVCache(model, router="all", **SMALL) if first == "attach" else None
    model = HOW[how](model, tmp_path)
    assert is_offloaded(model)
    cache = cache or PiKVCache(model, router="all", **SMALL)
    for options, reference in zip(OPTIONS, expected, strict=True):
        assert_same(generate_with(model, inputs, cache, **options), reference)
        assert_sealed_in_prefill_and_decode(cache, max(PADDED))
        assert all(not t.is_meta for layer in paged(cache) for t in layer.state.tensors())
        assert all(layer.device == torch.device("cpu") for layer in paged(cache))
        assert is_offloaded(model), "the cache brought weights back for good"
        cache = PiKVCache(model, router="all", **SMALL)
    del cache
    assert_same(generate_with(model, inputs, dynamic(model)), expected[0])
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "method", [{"compressor": "int8"}, {"scheduler": "streaming_llm", "budget": 16}]
)
def test_methods_on_an_offloaded_model(name, method, tmp_path) -> None:
    model = build(name)
    inputs = prompt(model, PADDED)
    options = {**method, **SMALL}
    expected = generate_with(model, inputs, PiKVCache(model, **options))
    model = disk_offload(model, tmp_path, torch.device("cpu"))
    assert is_offloaded(model)
    assert_same(generate_with(model, inputs, PiKVCache(model, **options)), expected)


def test_several_devices() -> None:
    """Models spread over two logical devices, in a process that may register them."""
    run_on_fakegpu("on_fakegpu.py", "mixtral:default", "deepseek_v3:int8", "gpt_oss:streaming")


RECORDING = ("h2o", "lru", "lru_plus")  # keep count of each token, padded rows too


@pytest.mark.parametrize(
    "names", [RECORDING, pytest.param((), marks=pytest.mark.slow)], ids=["records", "all"]
)
def test_methods_give_the_tokens_of_the_cpu(names) -> None:
    """Rows of a left-padded batch on a logical device."""
    run_on_fakegpu("methods_on_fakegpu.py", *names)


def test_nan_that_is_sealed_is_refused_later() -> None:
    """A seal on an accelerator does not wait; what follows refuses the cache."""
    run_on_fakegpu("finite_on_fakegpu.py")


def run_on_fakegpu(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1].joinpath(script), *arguments],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
