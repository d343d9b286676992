"""`pikv` on held-out activations of the bundled model: no single compressor is better."""

import functools
from typing import NamedTuple

import pytest
import torch
from tolerances import FLOAT64
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_hf.compressors import Compressor, Fp8, Int2, Int4, Int8, PiKV, Svd, TurboQuant
from pikv_hf.needles.haystack import KINDS, NEEDLE_MODEL, make_haystack

PAGE, WINDOW, OBSERVED = 64, 64, 32


class Heads(NamedTuple):
    """A layer over a text and six questions: keys and values [1, H, T, D] in bfloat16, and queries.

    `seen` are those of the newest tokens of the text, `new` those of the questions: scaled, of all
    query heads of a KV head, [1, H, Q, D].
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    new: Tensor
    sealed: int


@functools.cache
def activations(seed: int) -> list[Heads]:
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(NEEDLE_MODEL)
    found = []

    def record(module, query, key, value, mask, scaling, **options):
        found.append((query.unflatten(1, (key.shape[1], -1)) * scaling, key, value))
        eager = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return eager(module, query, key, value, mask, scaling=scaling, **options)

    ALL_ATTENTION_FUNCTIONS.register("record", record)
    ALL_MASK_ATTENTION_FUNCTIONS.register("record", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "record"
    hay = make_haystack(length=1500, needles=6, seed=seed, kinds=KINDS)
    asked = " ".join(f"{q} {a} ." for q, a in zip(hay.questions, hay.answers, strict=True))
    text, questions = (tokenizer(t, return_tensors="pt").input_ids for t in (hay.text, asked))
    with torch.no_grad():
        model(torch.cat([text, questions], dim=1))
    end = text.shape[1]
    sealed = (end - WINDOW) // PAGE * PAGE
    return [
        Heads(
            key[:, :, :end].bfloat16(),
            value[:, :, :end].bfloat16(),
            query[:, :, :, end - OBSERVED : end].flatten(2, 3),
            query[:, :, :, end:].flatten(2, 3),
            sealed,
        )
        for query, key, value in found
    ]


def pages_of(heads: Heads) -> list[Tensor]:
    return [t[:, :, : heads.sealed].unflatten(2, (-1, PAGE)) for t in (heads.keys, heads.values)]


def output_of(heads: Heads, pages: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of the questions over these pages and the rest of the text, in float64."""
    flat = [
        torch.cat([page.flatten(2, 3), whole[:, :, heads.sealed :]], dim=2).double()
        for page, whole in zip(pages, (heads.keys, heads.values), strict=True)
    ]
    return (heads.new.double() @ flat[0].mT).softmax(-1) @ flat[1]


@functools.cache
def again(member: Compressor, seed: int) -> list[tuple[float, tuple[Tensor, Tensor]]]:
    """Of each layer the bytes of a page, and all pages decoded."""
    found = []
    for heads in activations(seed):
        pages = pages_of(heads)
        fields = member.encode(*pages)
        nbytes = sum(t.numel() * t.element_size() for t in fields.values())
        found.append((nbytes / pages[0].shape[:3].numel(), member.decode(fields)))
    return found


def loss(method: Compressor, seeds: range) -> tuple[float, float]:
    """Share of bytes, and relative error of attention outputs, over all layers and seeds."""
    size, full, wrong = 0.0, 0.0, []
    members = method.members if isinstance(method, PiKV) else (method,)
    for seed in seeds:
        for layer, heads in enumerate(activations(seed)):
            pages = pages_of(heads)
            choice = torch.zeros(pages[0].shape[:3], dtype=torch.int64)
            if isinstance(method, PiKV):
                choice = method.assign(*pages, heads.seen)
            mixed = [torch.zeros_like(t) for t in pages]
            for number, member in enumerate(members):
                nbytes, decoded = again(member, seed)[layer]
                mine = choice == number
                size += nbytes * int(mine.sum())
                for state, changed in zip(mixed, decoded, strict=True):
                    state[mine] = changed[mine]
            full += sum(t.numel() * t.element_size() for t in pages)
            exact = output_of(heads, pages)
            error = (output_of(heads, mixed) - exact).norm() / exact.norm()
            wrong.append(error.item() ** 2)
    return size / full, (sum(wrong) / len(wrong)) ** 0.5


TURBO = tuple(TurboQuant(bits=bits) for bits in (2, 3, 4))
SINGLES = (Int8(), Int4(), Int2(), Fp8(), Svd(rank=4), Svd(rank=16), *TURBO)
BETWEEN = (0.19, 0.25, 0.35, 0.45, 0.7)  # above what any single one of them takes
SHARES = (0.16, 0.2, 0.4, *BETWEEN)


@pytest.mark.parametrize("first_seed", [100, 200])
def test_no_single_compressor_of_as_many_bytes_is_better(first_seed) -> None:
    """For questions that were not observed: with the bytes of each of them, and between."""
    seeds = range(first_seed, first_seed + 2)
    singles = [loss(single, seeds) for single in SINGLES]
    for share in [*SHARES, *(size for size, _ in singles)]:
        size, error = loss(PiKV(share=share), seeds)
        assert size <= share * (1 + FLOAT64)
        best = min(error for size, error in singles if size <= share * (1 + FLOAT64))
        assert error <= best * (1 + FLOAT64)
        if share in BETWEEN:
            assert error < 0.9 * best


@pytest.mark.parametrize("bits, worse", [(4, 0.98), (2, 0.97)])
def test_each_head_has_the_better_of_two_of_equal_bytes(bits, worse) -> None:
    """`int4` or `turboquant`, none of which is better everywhere: better than either alone."""
    integer, turbo = {4: Int4(), 2: Int2()}[bits], TurboQuant(bits=bits)
    seeds = range(100, 103)
    (size, error), (_, other) = loss(integer, seeds), loss(turbo, seeds)
    chosen = loss(PiKV(share=size, candidates=(integer, turbo)), seeds)
    assert chosen[0] == size
    assert chosen[1] < worse * min(error, other)
