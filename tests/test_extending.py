"""The methods of docs/extending.md work as they are printed."""

import re
from pathlib import Path

import pytest
import torch
from helpers import SMALL, dynamic, generate, paged, slabs_of, spans_of, tiny
from tolerances import LOGITS
from zoo import prompt

from pikv_hf import PiKVCache

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
EXAMPLES = list(zip(BLOCKS[::2], BLOCKS[1::2], strict=True))


def made(number: int, model) -> PiKVCache:
    """The cache that an example ends with."""
    definition, use = EXAMPLES[number]
    names = {"PiKVCache": PiKVCache, "model": model}
    exec(definition, names)  # noqa: S102
    exec(f"{use.rstrip().removesuffix(')')}, **{SMALL})", names)  # noqa: S102
    return names["cache"]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_it_generates(number) -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (60, 51))
    cache, full = made(number, model), dynamic(model)
    tokens = generate(model, inputs, full).tokens
    assert generate(model, inputs, cache).tokens.shape == tokens.shape
    assert all(slabs_of(layer) for layer in paged(cache))


def test_the_scheduler_keeps_large_values() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    cache, full = made(0, model), dynamic(model)
    for held in (cache, full):
        generate(model, inputs, held, max_new_tokens=1)
    for layer, whole in zip(paged(cache), full.layers, strict=True):
        kept = spans_of(layer, [0])[0]["positions"].expand(1, 2, -1)[0]
        norms = whole.values[0].norm(dim=-1)
        for head in range(2):
            others = set(range(48)) - set(kept[head].tolist())
            assert norms[head, kept[head].long()].min() >= norms[head, list(others)].max()


def test_the_compressor_holds_a_quarter() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (60,))
    cache = made(1, model)
    logits = generate(model, inputs, cache).logits
    exact = generate(model, inputs, dynamic(model)).logits
    assert torch.allclose(logits[0], exact[0], atol=LOGITS), "the prompt is read uncompressed"
    fields = [t for layer in paged(cache) for s in slabs_of(layer) for t in s.fields.values()]
    assert {t.dtype for t in fields} == {torch.float8_e4m3fn}


def test_the_router_reads_the_newest_pages() -> None:
    """As long as there are no more than these, nothing changes; then it does."""
    model = tiny("mixtral")
    for length, is_same in ((14, True), (60, False)):
        inputs = prompt(model, (length,))
        routed = generate(model, inputs, made(2, model), max_new_tokens=6).logits
        exact = generate(model, inputs, dynamic(model), max_new_tokens=6).logits
        assert torch.allclose(routed, exact, atol=LOGITS) == is_same
