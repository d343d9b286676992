"""`pyramid`: which pages are stored how finely, and what `observed_attention` says of pages."""

import copy
from collections import Counter
from io import BytesIO

import pytest
import torch
from helpers import PADDED, SMALL, assert_same, dynamic, generate, paged, slabs_of, tiny
from tolerances import FLOAT64, VISIBLE
from torch import Tensor
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Fp8, Identity, Int2, Int4, Int8, LowRank, Pyramid
from pikv_hf.compressors.observed_attention import page_masses, queries_or_stand_ins
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import StreamingLLM
from pikv_hf.storage.ragged_pages import RaggedPages

SEEDS = pytest.mark.parametrize("seed", range(3))


def random_pages(seed: int, rows=2, heads=3, pages=7, dim=16) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [R, H, S, 8, D], the last page of each row three tokens short, and queries."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, heads, pages, 8, dim
    keys, values = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    keys[:, :, -1, 5:] = values[:, :, -1, 5:] = 0
    queries = torch.randn(rows, heads, 10, dim, generator=generator, dtype=torch.float64)
    return keys, values, queries


def masses_of(keys: Tensor, queries: Tensor) -> Tensor:
    """Attention mass of each page of one KV head; `keys` [S, 8, D], five of the last are tokens."""
    tokens = keys.flatten(0, 1)[: keys.shape[0] * 8 - 3]
    weights = (queries @ tokens.T).softmax(-1).mean(0)
    return torch.stack([part.sum() for part in weights.split(8)])


@SEEDS
def test_masses(seed) -> None:
    """Against plain attention; neither padded queries nor the end of a page count."""
    keys, _, queries = random_pages(seed)
    masses = page_masses(keys, queries)
    for row in range(2):
        for head in range(3):
            expected = masses_of(keys[row, head], queries[row, head])
            assert (masses[row, head] - expected).abs().max() < FLOAT64
    padded = torch.cat([torch.zeros_like(queries), queries], dim=2)
    assert (page_masses(keys, padded) - masses).abs().max() < FLOAT64


def test_masses_of_many_pages_are_those_of_a_few_at_a_time() -> None:
    keys, _, queries = random_pages(0, pages=150)
    expected = masses_of(keys[1, 2], queries[1, 2])
    assert (page_masses(keys, queries)[1, 2] - expected).abs().max() < FLOAT64


@SEEDS
@pytest.mark.parametrize("shares", [(0.25, 0.5, 0.25), (0.1, 0.2, 0.7), (0.0, 1.0, 0.0)])
def test_tiers_are_those_of_the_masses(seed, shares) -> None:
    """Ranked over the heads of a row, and in each row alone."""
    keys, values, queries = random_pages(seed)
    method = Pyramid(shares=shares)
    choice = method.assign(keys, values, queries)
    ends = [round(shares[0] * 21), round((shares[0] + shares[1]) * 21)]
    for row in range(2):
        masses = torch.stack([masses_of(keys[row, h], queries[row, h]) for h in range(3)])
        rank = masses.flatten().argsort(descending=True).argsort()
        expected = [sum(place >= end for end in ends) for place in rank.tolist()]
        assert choice[row].flatten().tolist() == expected
        alone = method.assign(*(t[row : row + 1] for t in (keys, values, queries)))
        assert torch.equal(alone[0], choice[row])


def test_the_page_that_is_looked_at_is_finest() -> None:
    keys, values, _ = random_pages(0)
    queries = torch.zeros(2, 3, 1, 16, dtype=torch.float64)
    queries[:, 1] = 9 * keys[:, 1, 4, 2:3]
    finest = Pyramid(tiers=(Identity(), Int4()), shares=(1 / 21, 20 / 21))
    assert (finest.assign(keys, values, queries) == 0).nonzero().tolist() == [[0, 1, 4], [1, 1, 4]]


def test_without_queries_the_newest_keys_stand_in() -> None:
    keys, values, _ = random_pages(0)
    newest = keys.flatten(2, 3)[:, :, -32:] / 16**0.5
    assert torch.equal(queries_or_stand_ins(keys, None), newest)
    method = Pyramid()
    assert torch.equal(method.assign(keys, values, None), method.assign(keys, values, newest))


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 10, 1000])
def test_few_pages_are_shared_out_as_well_as_can_be(pages) -> None:
    counts = Counter(Pyramid()._tiers_of(pages))
    assert sum(counts.values()) == pages
    for tier, share in enumerate((0.25, 0.5, 0.25)):
        assert abs(counts[tier] - share * pages) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_sum_over_tiers(dtype) -> None:
    """Of the pages in the pools of a real cache: 16, which the shares divide without a rest."""
    model = build("mixtral", dtype=dtype, num_hidden_layers=1, head_dim=128)
    tiers = (Fp8(), Int4(), Int2())
    cache = PiKVCache(model, compressor=Pyramid(tiers=tiers), window=64)
    with torch.no_grad():
        model(prompt(model, (512 + 64,))["input_ids"], **with_cache(cache))
    pools = slabs_of(paged(cache)[0])
    assert {pool.codec for pool in pools} == set(tiers)
    total = 0
    for tier, pages in zip(tiers, (4, 8, 4), strict=True):
        mine = [pool for pool in pools if pool.codec == tier]
        assert sum(pool.page_count for pool in mine) == pages
        fields = [t[: pool.page_count] for pool in mine for t in pool.fields.values()]
        nbytes = sum(t.numel() * t.element_size() for t in fields)
        formula = tier.bytes_per_token(128, 128, dtype.itemsize, 64) * 64 * pages
        assert nbytes == pytest.approx(formula)
        total += nbytes
    mean = Pyramid(tiers=tiers).bytes_per_token(128, 128, dtype.itemsize, 64)
    assert total == pytest.approx(mean * 512 * model.config.num_key_value_heads)


@SEEDS
def test_tiers_by_attention_lose_less_than_the_same_tiers_turned_round(seed) -> None:
    keys, values, queries = random_pages(seed, pages=16)
    queries = queries * 1.5
    tiers, shares = (Int8(), Int4(), Int2()), (0.25, 0.5, 0.25)
    found = [tier.decode(tier.encode(keys, values)) for tier in tiers]
    choice = Pyramid(tiers=tiers, shares=shares).assign(keys, values, queries[:, :, :5])

    def outputs(states: tuple[Tensor, Tensor]) -> Tensor:
        flat = [t.flatten(2, 3)[:, :, :-3] for t in states]
        return (queries @ flat[0].mT).softmax(-1) @ flat[1]

    errors = []
    for chosen in (choice, 2 - choice):
        pages = [
            torch.stack(part).gather(0, chosen[None, ..., None, None].expand(1, *keys.shape))[0]
            for part in zip(*found, strict=True)
        ]
        errors.append((outputs(tuple(pages)) - outputs((keys, values))).norm())
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["pyramid", "pikv"])
@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_copy_goes_on_as_the_original(name, how) -> None:
    model = tiny("mixtral")
    inputs = prompt(model, PADDED)
    longer = {k: torch.cat([v, v[:, -9:]], dim=1) for k, v in inputs.items()}
    with PiKVCache(model, compressor=name, **SMALL) as cache:
        generate(model, inputs, cache)
        cache.crop(inputs["input_ids"].shape[1] - 1 - cache.get_seq_length())
        if how == "deepcopy":
            twin = copy.deepcopy(cache)
        else:
            file = BytesIO()
            torch.save(cache, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False).attach(model)
        pools = [slab for layer in paged(twin) for slab in slabs_of(layer)]
        assert pools and all(isinstance(pool, RaggedPages) for pool in pools)
        expected = generate(model, longer, cache)
        assert_same(generate(model, longer, twin), expected)
        exact = generate(model, longer, dynamic(model))
        assert (exact.logits - expected.logits).abs().max() > VISIBLE, "nothing was quantized"


@pytest.mark.parametrize("name", ["pyramid", "pikv"])
def test_a_scheduler_keeps_the_same_tokens(name) -> None:
    model = tiny("mixtral")
    inputs, options = prompt(model, PADDED), {"scheduler": StreamingLLM(sinks=2), "budget": 16}
    held = []
    for compressor in (name, None):
        cache = PiKVCache(model, compressor=compressor, **SMALL, **options)
        generate(model, inputs, cache)
        held.append([layer.state.held_tokens() for layer in paged(cache)])
    assert held[0] == held[1]


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"tiers": [Int8()]}, TypeError, "`tiers` is .*; it must be a tuple of compressors"),
        ({"tiers": ()}, TypeError, r"`tiers` is \(\)"),
        ({"tiers": ("int8", Int4(), Int2())}, TypeError, "`tiers` has 'int8', which is no Compr"),
        ({"tiers": (Pyramid(),), "shares": (1,)}, ValueError, "none that is calibrated or mixed"),
        ({"tiers": (LowRank(),), "shares": (1,)}, ValueError, "none that is calibrated or mixed"),
        ({"shares": 0.5}, TypeError, "`shares` is 0.5; it must be a tuple of numbers"),
        ({"shares": (0.5, 0.5)}, ValueError, "one number for each of 3 tiers"),
        ({"shares": (0.5, 0.6, -0.1)}, ValueError, "none negative"),
        ({"shares": (0.5, 0.5, 0.5)}, ValueError, "that sum up to 1"),
    ],
)
def test_wrong_options(options, error, match) -> None:
    with pytest.raises(error, match=match):
        Pyramid(**options)
