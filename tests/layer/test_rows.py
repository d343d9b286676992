"""A row of a batch is kept, encoded and attended to as it is alone."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers import paged, tail_length, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_combinations import OTHERS, SINGLE, UNCALIBRATED
from tolerances import SUMS
from torch import Tensor

from pikv_hf import PiKVCache
from pikv_hf.attention.function import pikv_attention
from pikv_hf.layer.paged_layer import PagedLayer

SIZE = {"page_size": 4, "window": 5}
# Every scheduler, and every compressor; "kvzip" has the model repeat a text.
PAIRS = [p for p in zip(SINGLE, itertools.cycle(UNCALIBRATED), strict=False) if p[0] != "kvzip"]
BUDGETS = (12, 0.5)


@dataclass
class Row:
    """The states of all tokens of a row, and the experts of each."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor

    @classmethod
    def draw(cls, tokens: int, seed: int) -> "Row":
        draw = torch.Generator().manual_seed(seed)
        states = (torch.randn(1, heads, tokens, 16, generator=draw) for heads in (4, 2, 2))
        return cls(*states, torch.rand(1, tokens, 4, generator=draw))


# The tokens of each row in one pass: in a batch, shorter rows are padded in front. Negative: the pass
# takes back the tokens of a pass.
Turn = tuple[int, ...]


@st.composite
def turns(draw: st.DrawFn) -> list[Turn]:
    """Turns of three rows: a prompt, single tokens, another prompt, single tokens."""
    prompt = st.tuples(*[st.integers(2, 30)] * 3)
    steps = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    first, second = draw(prompt), draw(prompt)
    return [first, *[(1, 1, 1)] * steps[0], second, *[(1, 1, 1)] * steps[1]]


@st.composite
def turns_taken_back(draw: st.DrawFn) -> list[Turn]:
    """A prompt, single tokens, a short turn that is taken back, another one, single tokens."""
    prompt, short = (st.tuples(*[st.integers(2, most)] * 3) for most in (30, 4))
    steps = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    first, gone, second = draw(prompt), draw(short), draw(short)
    back = tuple(-n for n in gone)
    return [first, *[(1, 1, 1)] * steps[0], gone, back, second, *[(1, 1, 1)] * steps[1]]


def run(rows: list[Row], passes: list[Turn], methods: dict) -> tuple[PagedLayer, list[Tensor]]:
    """A layer that has read `rows`, and the outputs [1, tokens, 4, 16] of each row."""
    model = tiny("mixtral", num_hidden_layers=1, head_dim=16)
    cache = PiKVCache(model, **methods, **SIZE)
    layer, module = paged(cache)[0], model.model.layers[0].self_attn
    outputs: list[list[Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    visible = torch.zeros(len(rows), 0, dtype=torch.bool)
    for lengths in passes:
        if lengths[0] < 0:
            cache.crop(min(lengths))
            visible = visible[:, : min(lengths)]
            done = [at + n for at, n in zip(done, lengths, strict=True)]
            continue
        width = max(lengths)
        parts = [slice(at, at + n) for at, n in zip(done, lengths, strict=True)]
        query, key, value = (
            padded(
                [getattr(row, name)[:, :, part] for row, part in zip(rows, parts, strict=True)], 2
            )
            for name in ("query", "key", "value")
        )
        scores = padded([r.scores[:, part] for r, part in zip(rows, parts, strict=True)], 1)
        new = torch.stack([torch.arange(width) >= width - n for n in lengths])
        visible = torch.cat([visible, new], dim=1)
        layer.update(key, value)
        out = pikv_attention(
            module, query, key, value, additive(visible, width, tail_length(layer)), scaling=0.25
        )[0]
        if layer.state.awaits:
            weights, experts = scores.topk(2)
            layer.label(experts, weights)
        cache.step.release()
        for row, n in enumerate(lengths):
            outputs[row].append(out[row : row + 1, width - n :])
        done = [at + n for at, n in zip(done, lengths, strict=True)]
    return layer, [torch.cat(parts, dim=1) for parts in outputs]


def additive(visible: Tensor, width: int, columns: int) -> Tensor | None:
    """The mask of `width` new tokens over the newest `columns`, as models make it."""
    causal = torch.ones(width, visible.shape[1], dtype=torch.bool).tril(visible.shape[1] - width)
    mask = (causal & visible[:, None, None])[..., -columns:]
    lowest = torch.finfo(torch.float32).min
    return None if mask.all() else torch.zeros(mask.shape).masked_fill(~mask, lowest)


def padded(parts: list[Tensor], dim: int) -> Tensor:
    width = max(part.shape[dim] for part in parts)
    return torch.cat(
        [torch.cat([part.new_full(_room(part, dim, width), 0.25), part], dim=dim) for part in parts]
    )


def _room(part: Tensor, dim: int, width: int) -> list[int]:
    return [width - n if at == dim else n for at, n in enumerate(part.shape)]


def contents(layer: PagedLayer, row: int) -> dict[str, list[Tensor]]:
    """Positions, keys and values of the sealed tokens of each KV head of a row, in order."""
    spans = layer.state.pages.spans([row])
    found: dict[str, list[Tensor]] = {}
    for name, head in itertools.product(("positions", "keys", "values"), range(2)):
        parts = []
        for span in spans:
            valid = span.all_valid()["valid"].expand(span["keys"].shape[:3])[0, head]
            data = span[name]
            if name == "positions":
                data = layer.state.columns.numbered([row], data).expand(span["keys"].shape[:3])
            parts.append(data[0, head][valid].flatten())
        found.setdefault(name, []).append(torch.cat(parts) if parts else torch.empty(0))
    return found


@pytest.mark.parametrize(
    "methods",
    [
        {},
        *({"compressor": OTHERS.get(name, name)} for name in UNCALIBRATED),
        *(
            {"scheduler": scheduler, "compressor": OTHERS.get(name, name), "budget": budget}
            for (scheduler, name), budget in zip(PAIRS, itertools.cycle(BUDGETS), strict=False)
        ),
        {"router": "all", "compressor": "int8"},
    ],
    ids=str,
)
@settings(max_examples=8, deadline=None)
@given(passes=turns(), seed=st.integers(0, 2**16))
def test_a_row_gives_what_it_gives_alone(methods, passes, seed) -> None:
    assert_alone(methods, passes, seed)


QUERYING = ("snapkv", "tova", "pyramidkv", "expected_attention", "criticalkv", "h2o")


@pytest.mark.parametrize("scheduler", QUERYING)
@settings(max_examples=8, deadline=None)
@given(passes=turns_taken_back(), seed=st.integers(0, 2**16))
def test_a_row_takes_back_its_own_queries(scheduler, passes, seed) -> None:
    assert_alone({"scheduler": scheduler, "budget": 12}, passes, seed)


def assert_alone(methods: dict, passes: list[Turn], seed: int) -> None:
    rows = [Row.draw(sum(abs(turn[row]) for turn in passes), seed + row) for row in range(3)]
    layer, outputs = run(rows, passes, methods)
    for row in range(3):
        alone, expected = run([rows[row]], [(turn[row],) for turn in passes], methods)
        ours, theirs = contents(layer, row), contents(alone, 0)
        assert all(map(torch.equal, ours["positions"], theirs["positions"])), row
        for name in ("keys", "values"):
            for one, other in zip(ours[name], theirs[name], strict=True):
                # Equal codes: another code would differ by far more than sums do.
                assert torch.allclose(one, other, rtol=0, atol=SUMS), (row, name)
        assert (outputs[row] - expected[0]).abs().max() <= SUMS
