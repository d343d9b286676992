"""Run by test_placement.py in a process of its own: NaN that is sealed on a logical accelerator."""

import functools

import fakecuda  # noqa: F401 - first: before any model is built
import fakegpu
import pytest
import torch
from accelerate import dispatch_model
from helpers import SMALL, paged
from zoo import build

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

HERE = torch.device("fakegpu", 0)


def forward(model, cache, tokens: int):
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        return model(ids.to(HERE), **with_cache(cache)).logits


def main() -> None:
    """The seal does not wait; the next use of the cache names layer and compressor, until `reset`."""
    torch.set_num_threads(1)
    model = build("qwen3_moe", num_hidden_layers=2)
    model.set_experts_implementation("eager")
    places = {name: "fakegpu:0" for name, _ in model.named_children()}
    model = dispatch_model(model, places, main_device="fakegpu:0", force_hooks=True)
    for part in ("key", "value"):
        cache = PiKVCache(model, compressor="int8", **SMALL)
        forward(model, cache, 4)
        getattr(paged(cache)[1].state.tail, f"{part}s")[0, 1, 2, 3] = torch.nan
        fakegpu.reset()
        forward(model, cache, 60)
        for use in (functools.partial(forward, model, cache, 1), cache.fork):
            with pytest.raises(
                ValueError, match=f"layer 1: int8 cannot store {part}s that are NaN"
            ):
                use()
        cache.reset()
        forward(model, cache, 60)
        assert forward(model, cache, 1).isfinite().all()


main()
