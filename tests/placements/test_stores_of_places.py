"""What the stores of each place hold: pages of its experts, in even numbers, in its memory."""

import pytest
import torch
from helpers import Scattered
from on_one_cpu import places_of
from tolerances import FLOAT32

from pikv_hf.compressors import Identity
from pikv_hf.placements import DeviceMap, Experts, Offload, PiKVXor, Spread
from pikv_hf.placements.sharding import Dealt
from pikv_hf.placements.site import PlacedLayer, Site
from pikv_hf.storage.page_table import PageTable
from pikv_hf.storage.ragged_pages import RaggedPages
from pikv_hf.storage.room import Room
from pikv_hf.storage.tiers import Elsewhere, Near, Ram
from pikv_hf.storage.token_table import TokenTable

SIZE, HEADS, NUM_EXPERTS, ROWS = 4, 2, 8, 3
CUDA = [torch.device("cuda", number) for number in range(3)]


def append(table: PageTable, tokens: int, start: int, *, ragged=False, uneven=False) -> int:
    """Append random tokens, and return the column behind them."""
    experts = torch.randint(0, NUM_EXPERTS, (ROWS, 1, tokens, 2))
    span = {
        "keys": torch.randn(ROWS, HEADS, tokens, 4),
        "values": torch.randn(ROWS, HEADS, tokens, 4),
        "positions": torch.arange(start, start + tokens).view(1, 1, -1),
        "experts": experts.to(torch.uint8),
        "weights": torch.rand(ROWS, 1, tokens, 2) + 0.01,
    }
    if ragged:
        counts = torch.randint(0, tokens + 1, (ROWS, HEADS, 1))
        span["valid"] = torch.arange(tokens) < counts
    lengths = [tokens, *torch.randint(0, tokens + 1, (ROWS - 1,)).tolist()] if uneven else None
    table.append(TokenTable(span), list(range(ROWS)), ROWS, lengths=lengths)
    return start + tokens


def pages_of(slab) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Experts and weights [tokens, k] of each page of a store; of its first KV head if uniform."""
    labels = [slab.meta[name] for name in ("experts", "weights")]
    if isinstance(slab, RaggedPages):
        counts = slab.lengths[: slab.page_count].tolist()
        return [tuple(t[n, 0, :count] for t in labels) for n, count in enumerate(counts)]
    rows = [t.expand(slab.rows, *t.shape[1:])[:, 0] for t in labels]
    size = slab.page_size
    return [
        tuple(t[row, start : min(start + size, length)] for t in rows)
        for row, length in enumerate(slab.lengths)
        for start in range(0, length, size)
    ]


def owner_of(experts: torch.Tensor, weights: torch.Tensor, count: int, number: int) -> set[int]:
    """The places that own the expert with the largest share, those that are as good included."""
    part = weights / weights.sum(-1, keepdim=True)
    shares = [part[experts == expert].sum().item() for expert in range(NUM_EXPERTS)]
    best = [e for e, share in enumerate(shares) if share >= max(shares) - FLOAT32]
    return {(e * count // NUM_EXPERTS + number) % count for e in best}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("way", ["even", "uneven", "ragged", "mixed"])
def test_pages_are_in_the_places_of_their_experts(count, way) -> None:
    """Partial pages, too, whose padding has labels that must not count."""
    table = PageTable(
        Scattered() if way == "mixed" else Identity(),
        SIZE,
        places_of(Experts(capacity_factor=99.0), count, PlacedLayer(1, 1, 4, NUM_EXPERTS)),
    )
    start = 0
    for tokens in (5, 1, 30, 4, 7, 64):
        start = append(table, tokens, start, ragged=way == "ragged", uneven=way == "uneven")
    found = 0
    for place in range(count):
        for slab in table.of_place(place):
            for experts, weights in pages_of(slab):
                assert place in owner_of(experts, weights, count, 1)
                found += 1
    assert found > 30 and all(table.of_place(place) for place in range(count))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("codec", [Identity(), Scattered()], ids=["identity", "mixed"])
def test_pools_are_even_at_every_moment(count, codec) -> None:
    """Over all rows and KV heads together; cleared tables begin again with the same place."""
    table = PageTable(codec, SIZE, places_of(Spread(), count, PlacedLayer(1, 1, 4)))
    for _ in range(2):
        start, firsts = 0, []
        for tokens in torch.randint(1, 9, (30,)).tolist():
            start = append(table, tokens, start, ragged=True)
            loads = [sum(s.page_count for s in table.of_place(n)) for n in range(count)]
            assert max(loads) - min(loads) <= 1
            assert max(loads) == loads[1 % count], "it is the first that gets a page"
            firsts.append(sum(loads))
        assert firsts[-1] > 10 * count
        table.clear()
        assert not table.slabs and len([table.of_place(n) for n in range(count)]) == count


@pytest.mark.parametrize("count", [2, 4])
def test_pikv_xor_goes_on_with_the_number_of_the_page(count) -> None:
    table = PageTable(Identity(), SIZE, places_of(PiKVXor(), count, PlacedLayer(0, 0, 4)))
    start = 0
    for pages in (1, 2, 1, 3, 1):
        start = append(table, pages * SIZE, start)
    for place in range(count):
        first = {int(p) for s in table.of_place(place) for p in s.meta["positions"][0, 0, ::SIZE]}
        assert first == {SIZE * page for page in range(8) if page % count == place}


@pytest.mark.parametrize("count", [2, 5])
def test_the_room_for_later_tokens_is_shared_by_the_places(count) -> None:
    tokens, later = 40 * SIZE, 100 * SIZE
    span = {
        "keys": torch.randn(1, HEADS, tokens, 4),
        "values": torch.randn(1, HEADS, tokens, 4),
        "positions": torch.arange(tokens).view(1, 1, -1),
    }
    capacity = []
    for places in (None, places_of(Spread(), count)):
        table = PageTable(Identity(), SIZE, places)
        room = Room(nbytes=10**6, tokens=later)
        table.append(TokenTable(span), [0], 1, room=room)
        capacity.append(sum(slab.capacity for slab in table.slabs))
    assert tokens + later <= capacity[1] <= capacity[0] + count * SIZE


def test_memory_of_places_in_one_process() -> None:
    """Pages are near on the device of the layer, and elsewhere on all others, with its limits."""
    layer, offload = PlacedLayer(3, 3, 8), Offload(device_bytes=800)
    places = Spread().places(layer, Site(devices=tuple(CUDA)))
    assert [places.tiers(n, CUDA[1]) for n in range(3)] == [
        [Elsewhere(CUDA[0])],
        [Near(CUDA[1])],
        [Elsewhere(CUDA[2])],
    ]
    places = Spread(offload=offload).places(layer, Site(devices=tuple(CUDA)))
    assert places.tiers(0, CUDA[1]) == [Elsewhere(CUDA[0], 100), Ram(CUDA[0])]
    assert places.tiers(1, CUDA[1]) == [Near(CUDA[1], 100), Ram(CUDA[1])]
    assert PageTable(Identity(), SIZE, places).is_limited(CUDA[1])
    assert not PageTable(Identity(), SIZE, places_of(Spread(), 3)).is_limited(CUDA[1])
    assert [places.name(n) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:2"]


def test_layers_share_the_memory_of_a_device() -> None:
    cpu, other = torch.device("cpu"), CUDA[0]
    of_layers = {0: (cpu,), 1: (other, cpu), 2: (other,), 5: (cpu,)}
    site = Site(devices=(cpu, other), of_layers=of_layers)
    method = DeviceMap(kv_device_map={"": "cpu"}, max_memory={"cpu": 900})
    found = [method.places(PlacedLayer(idx, n, 4), site) for n, idx in enumerate(of_layers)]
    assert [places.count for places in found] == [1, 2, 1, 1]
    limited = [Near(cpu, 300), Ram(cpu)]
    assert found[0].tiers(0, cpu) == found[3].tiers(0, cpu) == limited
    assert found[1].tiers(1, other) == [Elsewhere(cpu, 300), Ram(cpu)]
    assert found[1].tiers(0, other) == [Near(other)]
    table = PageTable(Identity(), SIZE, found[1])
    assert table.is_limited(other), "the second place has a limit"
    assert isinstance(found[2], Dealt) and found[2].tiers(0, cpu) == [Elsewhere(other)]
