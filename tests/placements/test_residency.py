"""Copies on the device of pages that a router has read: same results, fewer pages fetched."""

import pytest
import torch
from helpers import SMALL, assert_same, exact_model, generate, paged, tiny
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.layer.resident import FIRST_GAP, NEWEST_GAP, Resident
from pikv_hf.placements import RESIDENCIES, Offload, Residency
from pikv_hf.placements.residency import Belady, Lru, LruPlus
from pikv_hf.routers import Clusters, Quest, RandomPages

BYTES = "64KiB"
LONG = {"max_new_tokens": 24}


def offloaded(tmp_path, residency: str | Residency | None, nbytes: str | int = BYTES) -> Offload:
    return Offload(nbytes, ram_bytes=0, offload_folder=tmp_path, residency=residency)


def read(cache: PiKVCache) -> tuple[int, int, int]:
    rows = cache.report().layers
    return tuple(
        sum(getattr(row, name) for row in rows) for name in ("hits", "misses", "bytes_fetched")
    )


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("compressor", [None, "int8"])
@pytest.mark.parametrize("router", [Quest(), RandomPages(), Clusters(top_p=0.3)], ids=str)
@pytest.mark.parametrize("lengths", [(200,), (120, 120)], ids=len)
def test_the_same_results(residency, compressor, router, lengths, tmp_path) -> None:
    model = exact_model("qwen3_moe")
    inputs, options = prompt(model, lengths), {"router": router, "compressor": compressor} | SMALL
    expected = generate(model, inputs, PiKVCache(model, **options), **LONG)
    for placement in (offloaded(tmp_path, residency, "1MiB"), Offload(0, residency=residency)):
        cache = PiKVCache(model, placement=placement, **options)
        assert_same(generate(model, inputs, cache, **LONG), expected)
    kept = [layer.state.routing.resident for layer in paged(cache)]
    assert all(resident is None for resident in kept), "no byte is for copies"


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_pages_that_are_read_again_are_not_fetched_again(residency, tmp_path) -> None:
    model = tiny("qwen3_moe")
    inputs, options = prompt(model, (200,)), {"router": Quest()} | SMALL
    static = PiKVCache(model, placement=offloaded(tmp_path, None), **options)
    kept = PiKVCache(model, placement=offloaded(tmp_path, residency), **options)
    for cache in (static, kept):
        generate(model, inputs, cache, **LONG)
    assert sum(read(static)[:2]) == sum(read(kept)[:2])
    assert read(kept)[1] < read(static)[1]
    page_bytes = paged(kept)[0].state.pages.slabs[0].page_bytes
    assert read(kept)[2] == read(kept)[1] * page_bytes


def test_only_selected_pages_are_fetched(tmp_path) -> None:
    """An eighth of the pages are near: the bytes of the selected pages that are not."""
    model = tiny("qwen3_moe")
    inputs, options = prompt(model, (200,)), {"router": Quest(fraction=0.25)} | SMALL
    whole = PiKVCache(model, placement=Offload(2**20), **options)
    generate(model, inputs, whole)
    near = sum(whole.report().tiers.values()) // 8
    cache = PiKVCache(model, placement=offloaded(tmp_path, None, near), **options)
    assert_same(
        generate(model, inputs, cache), generate(model, inputs, PiKVCache(model, **options))
    )
    hits, misses, fetched = read(cache)
    total = sum(row.pages for row in cache.report().layers)
    assert hits + misses <= 0.25 * total + 8 and misses > 0
    assert fetched == misses * paged(cache)[0].state.pages.slabs[-1].page_bytes


def simulated(slots: list[list[float]], now: int, pages: list[int], residency: Residency) -> int:
    """Read `pages` at step `now` through `slots`, [page, last, uses, gap] each; return the misses.

    The page -1 stands for an empty slot, which is filled first; of equal slots the first one is.
    """
    missing = [page for page in pages if page not in [slot[0] for slot in slots]]
    leaving = [slot for slot in slots if slot[0] not in pages]
    worth = {
        id(slot): float(residency.utility(now - 1, *(torch.tensor(x) for x in slot[1:])))
        for slot in leaving
    }
    leaving.sort(key=lambda slot: -float("inf") if slot[0] < 0 else worth[id(slot)])
    for slot in slots:
        if slot[0] in pages:
            slot[3] += NEWEST_GAP * (now - slot[1] - slot[3])
            slot[1:3] = [float(now), slot[2] + 1]
    for page, slot in zip(missing, leaving, strict=False):
        slot[:] = [page, float(now), 1.0, FIRST_GAP]
    return len(missing)


@pytest.mark.parametrize("residency", [Lru(), LruPlus(), Belady()], ids=str)
def test_misses_equal_a_simulation(residency) -> None:
    """RandomPages selections from 12 pages, 3 at a time, through 5 slots for each head."""
    draw = torch.Generator().manual_seed(0)
    model = tiny("qwen3_moe")
    cache = PiKVCache(
        model, router=Quest(top_pages=3), placement=Offload(2**15, residency=residency), **SMALL
    )
    generate(model, prompt(model, (60,)), cache, max_new_tokens=2)
    state = paged(cache)[0].state
    plan = state.routing.plan
    resident = Resident.like(state.pages.slabs[0], residency, 1, 5)
    heads = [[[-1, -1.0, 0.0, FIRST_GAP] for _ in range(5)] for _ in range(2)]
    for now in range(1, 60):
        index = torch.stack([torch.randperm(12, generator=draw)[:3] ** 2 // 12 for _ in heads])[
            None
        ]
        index = torch.stack(
            [i if len(set(i.tolist())) == 3 else torch.arange(3) for i in index[0]]
        )[None]
        selection = resident.selection(plan, index, None)
        expected = [
            simulated(s, now, i.tolist(), residency) for s, i in zip(heads, index[0], strict=True)
        ]
        assert resident.missing.sum(-1)[0].tolist() == expected
        assert resident.page[0].tolist() == [[slot[0] for slot in slots] for slots in heads]
        stored = state.pages.slabs[0].pages_at(index, None)
        assert all(
            torch.equal(selection.store.pages_at(selection.index, None)[k], t)
            for k, t in stored.items()
        )


@pytest.mark.parametrize("residency", [Lru(), LruPlus(), Belady()], ids=str)
def test_utility(residency) -> None:
    """Pages read lately, often, or expected soon stay."""
    last, uses, gap = (
        torch.tensor([1.0, 5.0, 5.0]),
        torch.tensor([9.0, 1, 1]),
        torch.tensor([4.0, 2, 40]),
    )
    utility = residency.utility(6, last, uses, gap)
    lowest = {"Lru": 0, "LruPlus": 1, "Belady": 2}[type(residency).__name__]
    assert int(utility.argmin()) == lowest


def test_bad_residency(tmp_path) -> None:
    with pytest.raises(ValueError, match="`residency` is 'lur'.*'lru'"):
        Offload(residency="lur")


@pytest.mark.parametrize("router", [None, "all"])
def test_residency_needs_a_router_that_selects(router) -> None:
    with pytest.raises(ValueError, match=r"`placement` is Offload.*`router` is"):
        PiKVCache(tiny("qwen3_moe"), router=router, placement=Offload(residency="lru"))


def test_too_little_room_is_said(tmp_path) -> None:
    model = tiny("qwen3_moe")
    for nbytes, says in ((BYTES, False), (0, True)):
        placement = offloaded(tmp_path, "lru", nbytes)
        cache = PiKVCache(model, router=Quest(), placement=placement, **SMALL)
        generate(model, prompt(model, (200,)), cache)
        assert ("no copies on the device" in str(cache.report().to_dict())) == says
