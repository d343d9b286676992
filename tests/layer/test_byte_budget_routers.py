"""A budget in bytes counts what a router holds of pages."""

import pytest
import torch
from helpers import forward, tiny
from zoo import prompt

from pikv_hf import PiKVCache

BUDGET = 160 * 1024


@pytest.mark.parametrize("compressor", [None, "int4"])
@pytest.mark.parametrize("scheduler", ["keydiff", "adakv", "h2o"])
@pytest.mark.parametrize("router", ["quest", "clusters", "hierarchical", "balanced"])
def test_it_is_kept(router, scheduler, compressor) -> None:
    model = tiny("mixtral")
    options = {"scheduler": scheduler, "compressor": compressor, "budget": f"{BUDGET} B"}
    cache = PiKVCache(model, router=router, page_size=16, window=16, **options)
    ids, mask = prompt(model, (300,))["input_ids"], torch.ones(1, 340, dtype=torch.int64)
    forward(model, ids, mask[:, :300], cache)
    for end in range(301, 340):
        assert 0.5 * BUDGET < cache.nbytes <= BUDGET
        forward(model, ids[:, :1], mask[:, :end], cache)
