"""`pikv`: what a budget buys, nothing lost with a full one, and what is refused."""

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
from random_pages import SEEDS, random_pages
from tolerances import FLOAT64
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Distill, Identity, Int4, Int8, PiKV
from pikv_hf.compressors.observed_attention import output_errors
from pikv_hf.compressors.pikv import SHRINK, best_of_equal, cheapest
from pikv_hf.model.versions import with_cache
from pikv_hf.storage.ragged_pages import RaggedPages

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
        assert size > allowed or (spent <= errors[encoding].sum(1) + FLOAT64).all()
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
