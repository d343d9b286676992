"""`pikv`: errors of pages, what a budget buys with them, and errors on text that it has not seen."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import (
    FAMILIES,
    ONE_ROW,
    PADDED,
    SMALL,
    assert_same,
    dynamic,
    generate,
    paged,
    slabs_of,
    tiny,
    two_layers,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import (
    Compressor,
    Distill,
    Fp8,
    Identity,
    Int2,
    Int4,
    Int8,
    PiKV,
    Svd,
    TurboQuant,
)
from pikv_hf.compressors.observed_attention import output_errors
from pikv_hf.compressors.pikv import SHRINK, best_of_equal, cheapest
from pikv_hf.model.versions import with_cache
from pikv_hf.needles.haystack import KINDS, NEEDLE_MODEL, make_haystack
from pikv_hf.storage.ragged_pages import RaggedPages

SEEDS = pytest.mark.parametrize("seed", range(3))
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [ONE_ROW, PADDED], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("mode", MODES)
def test_a_full_budget_loses_nothing(name, lengths, mode) -> None:
    """Every page is stored as it is: logits and tokens are those of a DynamicCache."""
    model = two_layers(name)
    inputs = prompt(model, lengths)
    expected = generate(model, inputs, dynamic(model), **MODES[mode])
    cache = PiKVCache(model, compressor=PiKV(share=1.0), **SMALL)
    assert_same(generate(model, inputs, cache, **MODES[mode]), expected)
    pools = [slab for layer in paged(cache) for slab in slabs_of(layer)]
    assert pools and all(isinstance(pool, RaggedPages) for pool in pools)
    assert {pool.codec for pool in pools} == {Identity()}


# ---- errors of pages ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Nudged(Identity):
    """Adds a little, always the same, to keys and values."""

    by: float = 0.0

    def decode(self, fields):
        generator = torch.Generator().manual_seed(9)
        noise = [torch.randn(t.shape[-2:], generator=generator) for t in super().decode(fields)]
        return tuple(t + self.by * n for t, n in zip(super().decode(fields), noise, strict=True))


def random_pages(seed: int, is_latent: bool = False, rows=2, heads=2, pages=5):
    """Keys and values [R, H, S, 4, D], the last page a token short, and queries, one of padding."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, heads, pages, 4, 8, generator=generator).double()
    keys[:, :, -1, 3:] = values[:, :, -1, 3:] = 0
    queries = torch.randn(rows, heads, 6, 8, generator=generator).double()
    queries[:, :, 0] = 0
    return keys, (values[..., :0] if is_latent else values), queries


def attention(keys: Tensor, values: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and output over the tokens of pages [S, 4, D], of which the last is none."""
    tokens, values = (t.flatten(0, 1)[:-1] for t in (keys, values if values.shape[-1] else keys))
    weights = (tokens @ query).softmax(0)
    return weights, weights @ values


def predicted(original, again, queries: Tensor, shrink: float) -> list[float]:
    """`output_errors` of one row and head, token after token: [S].

    What all pages together do to outputs, shared out by what is predicted of each token.
    """
    parts, whole = [0.0] * original[0].shape[0], 0.0
    for query in queries[1:]:
        weights, output = attention(*original, query)
        whole += (attention(*again, query)[1] - output).square().sum().item()
        squares = (1 - shrink) * weights**2 + shrink * (weights**2).mean()
        for number, square in enumerate(squares):
            place = number // 4, number % 4
            key, key_again = original[0][place], again[0][place]
            is_latent = original[1].shape[-1] == 0
            value, value_again = (t[0 if is_latent else 1][place] for t in (original, again))
            logit = query @ (key_again - key)
            change = value_again - value + logit * (value - output)
            parts[place[0]] += (square * change.square().sum()).item()
    return [part * whole / sum(parts) for part in parts]


@SEEDS
@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_latent", [False, True], ids=["values", "latent"])
def test_errors_of_pages(seed, shrink, is_latent) -> None:
    keys, values, queries = random_pages(seed, is_latent)
    methods = Int4(), Nudged(by=0.1), Identity()
    errors = output_errors(methods, keys, values, queries, shrink)
    assert errors.shape == (3, 2, 2, 5) and (errors[2] == 0).all()
    for number, method in enumerate(methods[:2]):
        again = method.decode(method.encode(keys, values))
        for row in range(2):
            for head in range(2):
                pages = [(k[row, head], v[row, head]) for k, v in ((keys, values), again)]
                expected = predicted(*pages, queries[row, head], shrink)
                actual = errors[number, row, head].tolist()
                assert actual == pytest.approx(expected, rel=1e-9)


@SEEDS
@pytest.mark.parametrize("is_latent", [False, True], ids=["values", "latent"])
def test_small_changes_of_single_tokens_have_the_predicted_effects(seed, is_latent) -> None:
    """Shared out as the true changes of attention outputs, to first order, if nothing is shrunk."""
    keys, values, queries = random_pages(seed, is_latent)
    generator = torch.Generator()

    class OneToken(Identity):
        def decode(self, fields):
            noise = torch.randn(2, 8, generator=generator.manual_seed(seed)).double() * 1e-5
            for states, change in zip((pair := super().decode(fields)), noise, strict=True):
                if states.shape[-1]:
                    states[:, :, :, 2] += change
            return pair

        def encode(self, keys, values):
            return super().encode(keys.clone(), values.clone())

    errors = output_errors((OneToken(),), keys, values, queries, 0.0)[0]
    again = OneToken().decode(OneToken().encode(keys, values))

    def moved(row: int, head: int, pages: list[int]) -> float:
        """By the changes in `pages` alone."""
        mixed = [t[row, head].clone() for t in (keys, values)]
        for mine, changed in zip(mixed, again, strict=True):
            mine[pages] = changed[row, head, pages]
        before, after = (
            torch.stack([attention(*states, query)[1] for query in queries[row, head, 1:]])
            for states in ((keys[row, head], values[row, head]), mixed)
        )
        return (after - before).square().sum().item()

    for row in range(2):
        for head in range(2):
            whole, each = moved(row, head, [*range(5)]), [moved(row, head, [p]) for p in range(5)]
            assert errors[row, head].sum().item() == pytest.approx(whole, rel=1e-6)
            expected = [whole * part / sum(each) for part in each]
            assert errors[row, head].tolist() == pytest.approx(expected, rel=1e-3)


def test_errors_of_many_pages_are_those_of_a_few_at_a_time() -> None:
    keys, values, queries = random_pages(0, pages=70)
    errors = output_errors((Int2(),), keys, values, queries, 0.5)[0, 1, 1]
    again = Int2().decode(Int2().encode(keys, values))
    pages = [(k[1, 1], v[1, 1]) for k, v in ((keys, values), again)]
    assert errors.tolist() == pytest.approx(predicted(*pages, queries[1, 1], 0.5), rel=1e-9)


# ---- the budget ---------------------------------------------------------------------------------


def bought(errors: list[list[float]], sizes: list[float], allowed: float) -> list[int]:
    """`cheapest` for one row, one step after the other; `errors` [M][n]."""
    pages = range(len(errors[0]))
    fit = [m for m, size in enumerate(sizes) if size <= allowed]
    now = [min(fit, key=lambda m: sum(errors[m]))] * len(pages)
    room = (allowed - sizes[now[0]]) * len(pages)
    while True:
        steps = [
            ((errors[now[page]][page] - errors[m][page]) / (size - sizes[now[page]]), page, m)
            for page in pages
            for m, size in enumerate(sizes)
            if size > sizes[now[page]] and errors[m][page] < errors[now[page]][page]
        ]
        if not steps:
            return now
        _, page, encoding = max(steps)
        room -= sizes[encoding] - sizes[now[page]]
        if room < 0:
            return now
        now[page] = encoding


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("allowed", [1.0, 1.7, 2.0, 3.3, 5.0, 8.0, 20.0])
def test_what_a_budget_buys(seed, allowed) -> None:
    """The steps one by one; within the budget, and no worse than any single encoding in it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([8.0, 4.0, 1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    errors = torch.rand(6, 3, 20, generator=generator, dtype=torch.float64).exp()
    errors = errors / sizes[:, None, None] ** 2
    errors[0] = 0
    errors[[1, 3], 1] *= 100  # this row begins with fewer bytes than the others
    choice = cheapest(errors, sizes, allowed)
    for row in range(3):
        assert choice[row].tolist() == bought(errors[:, row].tolist(), sizes.tolist(), allowed)
    assert (sizes[choice].sum(1) <= allowed * 20).all()
    spent = errors.gather(0, choice[None])[0].sum(1)
    for encoding, size in enumerate(sizes.tolist()):
        assert size > allowed or (spent <= errors[encoding].sum(1) + 1e-12).all()
    if allowed == 8.0:
        assert (choice == 0).all()


def test_of_equal_bytes_the_better_one_in_each_head() -> None:
    """Two pages of two heads of a row, in four encodings of two sizes."""
    heads = torch.tensor([[3.0, 9.0], [1.0, 2.0], [2.0, 1.0], [9.0, 5.0]])
    errors = heads[:, None, :, None] * torch.tensor([0.5, 1.5])
    merged, members, sizes = best_of_equal(errors, [8, 4, 4, 8])
    assert sizes == [4, 8] and members.tolist() == [[[1, 2]], [[0, 3]]]
    for number, encoding in enumerate(members[:, 0].tolist()):
        for head in range(2):
            assert torch.equal(merged[number, 0, head], errors[encoding[head], 0, head])


def test_a_page_of_which_nothing_is_wrong_takes_the_fewest_bytes() -> None:
    sizes = torch.tensor([4.0, 1.0])
    assert (cheapest(torch.zeros(2, 1, 3), sizes, 4.0) == 1).all()


@SEEDS
def test_bytes_go_where_the_queries_say(seed) -> None:
    """There is room for one page of each row as it is: that of the largest predicted error."""
    keys, values, queries = random_pages(seed, pages=10)
    for asked in (queries, queries.flip(-1)):
        choice = PiKV(share=0.24, candidates=(Int4(), Identity())).assign(keys, values, asked)
        errors = output_errors((Int4(),), keys, values, asked, SHRINK)[0]
        assert choice.flatten(1).sum(1).tolist() == [1, 1]
        assert torch.equal(choice.flatten(1).argmax(1), errors.flatten(1).argmax(1))
    assert not torch.equal(
        choice, PiKV(share=0.24, candidates=(Int4(), Identity())).assign(keys, values, queries)
    )


def test_rows_have_budgets_of_their_own() -> None:
    keys, values, queries = random_pages(0)
    keys[0] *= 5
    method = PiKV(share=0.5)
    choice = method.assign(keys, values, queries)
    for row in range(2):
        alone = method.assign(*(t[row : row + 1] for t in (keys, values, queries)))
        assert torch.equal(alone[0], choice[row])


@pytest.mark.parametrize("share", [0.15, 0.2, 0.3, 0.6])
def test_bytes_in_a_cache(share) -> None:
    """Pages of a prompt and of many steps take at most their share, and most of it."""
    model = build("mixtral", dtype=torch.bfloat16, num_hidden_layers=1, head_dim=128)
    cache = PiKVCache(model, compressor=PiKV(share=share), page_size=16, window=16)
    ids = prompt(model, (16 * 24,))["input_ids"]
    full = 2 * 128 * 2  # a token of one head
    with torch.no_grad():
        for part in (ids[:, :256], *ids[:, 256:].split(1, dim=1)):
            model(part, **with_cache(cache))
    pools = slabs_of(paged(cache)[0])
    tokens = sum(int(pool.held().sum()) for pool in pools)
    fields = [t[: pool.page_count] for pool in pools for t in pool.fields.values()]
    nbytes = sum(t.numel() * t.element_size() for t in fields)
    assert tokens == 2 * 16 * 23
    assert nbytes <= share * full * tokens
    assert nbytes <= PiKV(share=share).bytes_per_token(128, 128, 2, 64) * tokens
    assert nbytes >= 0.8 * share * full * tokens


# ---- held-out activations of the bundled model --------------------------------------------------

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
        assert size <= share * (1 + 1e-9)
        best = min(error for size, error in singles if size <= share * (1 + 1e-9))
        assert error <= best * (1 + 1e-9)
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


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, -0.5, 1.2, True, "0.3", None, float("nan")])
def test_wrong_shares(share) -> None:
    with pytest.raises(ValueError, match=r"`share` is .*; it must be a number in \(0, 1\]"):
        PiKV(share=share)


@pytest.mark.parametrize(
    "candidates, error, match",
    [
        (Int8(), TypeError, "`candidates` is .*; it must be a tuple of compressors"),
        ((Int8(), PiKV()), ValueError, "none that is calibrated or mixed"),
        ((Distill(),), ValueError, "none that is calibrated or mixed"),
    ],
)
def test_wrong_candidates(candidates, error, match) -> None:
    with pytest.raises(error, match=match):
        PiKV(candidates=candidates)


def test_a_share_that_nothing_fits() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, ONE_ROW)
    cache = PiKVCache(model, compressor=PiKV(share=0.01), **SMALL)
    with pytest.raises(ValueError, match="layer 0: `share` is 0.01, but no candidate takes less"):
        generate(model, inputs, cache)
