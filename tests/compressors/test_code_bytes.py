"""Bytes of encoded pages are those of the formula, and copies on the way are small."""

from typing import Any

import pytest
import torch
from helpers import paged, slabs_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from variants import NAMES, calibrated, fitted, states
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.fitting.calibration_job import METHODS
from pikv_hf.model.versions import with_cache


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
    assert nbytes / tokens / heads == pytest.approx(formula)
    if name in BOUNDS and (dtype == torch.bfloat16 or name != "identity"):
        assert nbytes / tokens / heads / 256 <= BOUNDS[name]


@NAMES
def test_bytes_of_latents(name) -> None:
    keys = states("", 1, 1, 4, 64, 576).bfloat16()
    compressor = fitted(name, (576, 0), heads=1)
    fields = compressor.encode(keys, keys[..., :0])
    measured = sum(t.numel() * t.element_size() for t in fields.values()) / (4 * 64)
    assert measured == pytest.approx(compressor.bytes_per_token(576, 0, 2, 64))
