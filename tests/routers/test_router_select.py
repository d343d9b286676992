"""Reading only the pages that a router selects, with a router made for the test."""

from dataclasses import dataclass

import pytest
import torch
from helpers import PADDED, SMALL, assert_close, dynamic, generate, prompt, tiny

from pikv_hf import PiKVCache
from pikv_hf.routers import Router


@dataclass(frozen=True)
class EveryNth(Router):
    """Reads pages 0, n, 2n, ... of each slab, in the opposite order."""

    n: int = 1

    def select(self, query, meta, pages):
        assert len(meta) == pages * SMALL["page_size"]
        assert "experts" not in meta or meta["experts"].shape[2] == len(meta)
        index = torch.arange(0, pages, self.n).flip(0)
        return index.expand(query.shape[0], query.shape[1], -1)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("lengths", [(29,), PADDED], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("compressor", [None, "int8"])
def test_selecting_every_page_reads_everything(name, lengths, compressor) -> None:
    model = tiny(name)
    inputs = prompt(model, lengths)
    settings = {"compressor": compressor, **SMALL}
    expected = generate(model, inputs, PiKVCache(model, **settings))
    cache = PiKVCache(model, router=EveryNth(1), **settings)
    assert_close(generate(model, inputs, cache).logits, expected.logits)


def test_beams_select_through_shared_rows() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (29,))
    expected = generate(model, inputs, dynamic(model), num_beams=3)
    found = generate(model, inputs, PiKVCache(model, router=EveryNth(1), **SMALL), num_beams=3)
    assert torch.equal(found.tokens, expected.tokens)


def test_selecting_half_of_the_pages_is_seen() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (29,))
    expected = generate(model, inputs, dynamic(model))
    found = generate(model, inputs, PiKVCache(model, router=EveryNth(2), **SMALL))
    with pytest.raises(AssertionError):
        assert_close(found.logits, expected.logits)
