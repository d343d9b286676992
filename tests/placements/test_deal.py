"""Where each page goes, beside a walk over the pages in plain Python; how even the places stay."""

import math
from collections import Counter

import pytest
import torch
from helpers import generate, paged, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from on_one_cpu import OnOneCpu, places_of
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import Identity
from pikv_hf.placements import DeviceMap, Experts, PiKVXor, Spread
from pikv_hf.placements.sharding import Dealt
from pikv_hf.placements.site import PlacedLayer, Site
from pikv_hf.storage.page_table import PageTable
from pikv_hf.storage.places import NewPages
from pikv_hf.storage.token_table import TokenTable

EXAMPLES = settings(max_examples=80, derandomize=True, database=None, deadline=None)
SIZE, NUM_EXPERTS, TOP = 3, 7, 2


ANY_COUNT, POWERS = st.integers(2, 6), st.sampled_from([2, 4, 8])


@st.composite
def dealings(draw, counts=ANY_COUNT):
    """New pages with holes and partial pages, and the places and the layer that they are for."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows, pages = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    heads, label_heads = draw(st.sampled_from([(1, 1), (3, 1), (3, 3), (1, 3)]))
    filled = torch.randint(0, SIZE + 1, (rows, heads, pages), generator=generator)
    shape = draw(st.sampled_from([1, rows])), label_heads, pages, SIZE
    skew = 1 / torch.arange(1.0, NUM_EXPERTS + 1)
    experts = skew.expand(math.prod(shape), -1).multinomial(TOP, generator=generator)
    labels = {
        "experts": experts.view(*shape, TOP),
        "weights": torch.rand(*shape, TOP, generator=generator) + 0.01,
    }
    count = draw(counts)
    loads = tuple(draw(st.lists(st.integers(0, 12), min_size=count, max_size=count)))
    new = NewPages(filled, draw(st.integers(0, 20)), loads, **labels)
    return new, PlacedLayer(draw(st.integers(0, 9)), draw(st.integers(0, 9)), 10, NUM_EXPERTS)


def pages_in(new: NewPages):
    """The indices of the entries that are pages, row by row and head by head."""
    return [tuple(at) for at in (new.filled > 0).nonzero().tolist()]


def top_expert(new: NewPages, at) -> int:
    """The expert with the largest share in the tokens of a page, the padding left out."""
    row, head, page = at
    tokens, shares = int(new.filled[at]), [0.0] * NUM_EXPERTS
    if new.filled.shape[1] == 1:
        heads = range(new.experts.shape[1])  # pages of all heads go together
    else:
        heads = [min(head, new.experts.shape[1] - 1)]
    row = min(row, new.experts.shape[0] - 1)
    for each in heads:
        for token in range(tokens):
            weights = new.weights[row, each, page, token].double()
            for expert, weight in zip(
                new.experts[row, each, page, token].tolist(), weights.tolist(), strict=True
            ):
                shares[expert] += weight / weights.sum().item()
    return max(range(NUM_EXPERTS), key=shares.__getitem__)


def dealt(method, new, layer, count, **site) -> dict:
    places = Dealt(method, layer, Site(devices=(torch.device("cpu"),) * count, **site))
    owner = places.deal(new)
    assert owner.shape == new.filled.shape and not owner.is_floating_point()
    assert int(owner.min()) >= 0 and int(owner.max()) < count
    return {at: int(owner[at]) for at in pages_in(new)}


def in_turn(new, layer, count) -> dict:
    return {at: (layer.number + new.dealt + n) % count for n, at in enumerate(pages_in(new))}


@EXAMPLES
@given(dealings())
def test_spread_deals_in_turn(given_pages) -> None:
    new, layer = given_pages
    count = len(new.loads)
    assert dealt(Spread(), new, layer, count) == in_turn(new, layer, count)


@EXAMPLES
@given(dealings(), st.sampled_from([1, 1.1, 1.5, 3.0]), st.booleans())
def test_experts_deals_to_owners_until_they_are_full(given_pages, factor, owns) -> None:
    new, layer = given_pages
    count, at_most = len(new.loads), None
    held, expected, spilled = list(new.loads), {}, []
    mean = (sum(held) + len(pages_in(new))) / count
    at_most = max(math.floor(factor * mean), math.ceil(mean))
    for at in pages_in(new):
        turn = 0 if owns else layer.number
        owner = (top_expert(new, at) * count // NUM_EXPERTS + turn) % count
        if held[owner] < at_most:
            expected[at] = owner
            held[owner] += 1
        else:
            spilled.append(at)
    for at in spilled:
        expected[at] = min(range(count), key=held.__getitem__)
        held[expected[at]] += 1
    method = Experts(capacity_factor=factor)
    assert dealt(method, new, layer, count, owns_experts=owns) == expected
    assert all(n <= max(at_most, before) for n, before in zip(held, new.loads, strict=True))


@EXAMPLES
@given(dealings(counts=POWERS))
def test_pikv_xor(given_pages) -> None:
    new, layer = given_pages
    count = len(new.loads)
    expected = {
        at: ((new.dealt + at[2]) % count) ^ (top_expert(new, at) % count) for at in pages_in(new)
    }
    assert dealt(PiKVXor(), new, layer, count) == expected


@EXAMPLES
@given(dealings(), st.integers(0, 2**32 - 1))
def test_device_map_deals_to_the_device_of_the_expert(given_pages, seed) -> None:
    new, layer = given_pages
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 4, (NUM_EXPERTS + 1,), generator=generator).tolist()
    own, *of_experts = (torch.device("cuda", number) for number in numbers)
    devices = tuple(dict.fromkeys((own, *of_experts)))
    site = Site(
        devices=(torch.device("cuda", 9), *devices[::-1]),  # those of all layers
        of_layers={layer.layer_idx: devices},
        of_experts={layer.layer_idx: tuple(of_experts)},
    )
    method = DeviceMap(kv_device_map={"": "cpu"})
    places = method.places(layer, site)
    assert places.count == len(devices)
    owner = places.deal(new)
    for at in pages_in(new):
        assert devices[owner[at]] == of_experts[top_expert(new, at)]
        assert places.name(int(owner[at])) == str(of_experts[top_expert(new, at)])
    other = method.places(layer, Site(devices=devices, of_layers={layer.layer_idx: devices}))
    for pages in (new, new._replace(experts=None, weights=None)):
        assert not other.deal(pages).any(), "the device of the layer is the first"
    assert not places.deal(new._replace(experts=None, weights=None)).any()


@EXAMPLES
@given(dealings(counts=POWERS))
def test_pages_without_labels(given_pages) -> None:
    """Dense layers, and layers whose number of experts is not known."""
    new, layer = given_pages
    count = len(new.loads)
    unlabelled = new._replace(experts=None, weights=None)
    dense = PlacedLayer(layer.layer_idx, layer.number, layer.count)
    by_number = {at: (new.dealt + at[2]) % count for at in pages_in(new)}
    for pages, of in ((unlabelled, layer), (new, dense)):
        assert dealt(Experts(), pages, of, count) == in_turn(new, layer, count)
        assert dealt(PiKVXor(), pages, of, count) == by_number


# ---- how even the places are --------------------------------------------------------------------


def pages_of_heads(table: PageTable, row: int) -> list[list[int]]:
    """Pages in each place of each KV head of a batch row."""
    found = []
    for place in range(table.places.count):
        lists = [(slab, slab.page_list()) for slab in table.of_place(place)]
        own = [x.full + x.partial for slab, x in lists if row in slab.readers]
        at = [slab.stored_of([row])[0] for slab, _ in lists if row in slab.readers]
        found.append(sum((each[n] for each, n in zip(own, at, strict=True)), torch.zeros(2)))
    return torch.stack(found, dim=1).int().tolist()


def append(table: PageTable, tokens: int, start: int, generator, batch: int = 1) -> None:
    """Append tokens with 2 KV heads, whose experts are distributed as Zipf's law says."""
    zipf = 1 / torch.arange(1.0, 65)
    chosen = zipf.expand(batch * tokens, -1).multinomial(TOP, generator=generator)
    span = {
        "keys": torch.randn(batch, 2, tokens, 4, generator=generator),
        "values": torch.randn(batch, 2, tokens, 4, generator=generator),
        "positions": torch.arange(start, start + tokens).view(1, 1, -1),
        "experts": chosen.view(batch, 1, tokens, TOP).to(torch.uint8),
        "weights": torch.rand(batch, 1, tokens, TOP, generator=generator),
    }
    table.append(TokenTable(span), list(range(batch)), batch)


@settings(EXAMPLES, max_examples=30)
@given(st.integers(2, 7), st.integers(0, 5), st.lists(st.integers(1, 30), max_size=40))
def test_spread_is_even_at_every_moment(count, number, seals) -> None:
    layer, generator = PlacedLayer(number, number, 6), torch.Generator().manual_seed(count)
    table, start = PageTable(Identity(), 4, places_of(Spread(), count, layer)), 0
    for tokens in seals:
        append(table, tokens, start, generator)
        start += tokens
        for pages in pages_of_heads(table, 0):
            assert max(pages) <= -(-sum(pages) // count)
            assert max(pages) - min(pages) <= 1


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("seal", [1, 3, 16])
@pytest.mark.parametrize("batch", [1, 3])
def test_experts_is_within_its_capacity_at_every_moment(count, seal, batch) -> None:
    """Of a text that is sealed page by page, or many pages at a time."""
    layer, generator = PlacedLayer(0, 0, 1, 64), torch.Generator().manual_seed(seal)
    table = PageTable(Identity(), 4, places_of(Experts(), count, layer))
    for start in range(0, 96 * 4, 4 * seal):
        append(table, 4 * seal, start, generator, batch)
        loads = [sum(x.page_count for x in table.of_place(n)) // 2 for n in range(count)]
        assert sum(loads) == batch * (start // 4 + seal)
        mean = sum(loads) / count
        assert max(loads) <= max(math.floor(1.1 * mean), math.ceil(mean))


@pytest.mark.parametrize("scheduler", ["streaming_llm", "h2o", "snapkv"])
@pytest.mark.parametrize("count", [2, 3])
def test_spread_is_even_after_evictions(scheduler, count, monkeypatch) -> None:
    model, seen = tiny("mixtral", num_hidden_layers=2), Counter()
    options = {"page_size": 2, "window": 4, "scheduler": scheduler, "budget": 32}
    cache = PiKVCache(model, placement=OnOneCpu(count), **options)
    then = PageTable.append

    def checked(table: PageTable, *args, **kwargs) -> None:
        then(table, *args, **kwargs)
        for pages in pages_of_heads(table, 0):
            assert max(pages) <= -(-sum(pages) // count), pages
            seen[sum(pages)] += 1

    monkeypatch.setattr(PageTable, "append", checked)
    generate(model, prompt(model, (60,)), cache, max_new_tokens=40)
    assert max(seen) >= 12 and len(paged(cache)) == 2


def test_layers_begin_with_other_places() -> None:
    """One page in each layer: no place has more than its share of them."""
    found = Counter()
    for number in range(6):
        new = NewPages(torch.full((1, 1, 1), 4), 0, (0, 0, 0))
        found[int(places_of(Spread(), 3, PlacedLayer(number + 7, number, 6)).deal(new))] += 1
    assert found == {0: 2, 1: 2, 2: 2}
