"""Pages beyond the device: the same results, limits that hold, bytes by tier."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import (
    FAMILIES,
    PADDED,
    SMALL,
    Scattered,
    assert_same,
    assert_sealed_in_prefill_and_decode,
    dynamic,
    exact_model,
    forward,
    generate,
    paged,
    slabs_of,
    tiny,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_pages import CacheOperations
from tolerances import SUMS
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.placements import Offload
from pikv_hf.placements.base import Alone
from pikv_hf.storage.page_table import PageTable

METHODS = {
    "lossless": {},
    "int4": {"compressor": "int4"},
    "mixed": {"compressor": Scattered()},
    "streaming": {"scheduler": "streaming_llm", "budget": 14},
    "adakv": {"scheduler": "adakv", "budget": 14},
}

MODES = [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}]


def limits(cache: PiKVCache, share: float = 0.25) -> int:
    """So many bytes that a share of the pages of `cache` fits."""
    return int(share * sum(cache.report().tiers.values()))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_results(name, method, tmp_path) -> None:
    """With pages in all three tiers, in left-padded rows, by beams, of lossless ones in chunks, too."""
    # In float64: pages are read in other blocks, and what that rounds is not to be seen.
    model = exact_model(name)
    inputs, options = prompt(model, PADDED), METHODS[method] | SMALL
    for mode in MODES if method == "lossless" else MODES[1:2]:
        near = PiKVCache(model, **options)
        expected = generate(model, inputs, near, **mode)
        if method == "lossless":
            assert_same(expected, generate(model, inputs, dynamic(model), **mode))
        some = limits(near, 0.35)  # for more pages than are moved at a time
        cache = PiKVCache(model, placement=Offload(some, some, tmp_path), **options)
        actual = generate(model, inputs, cache, **mode)
        assert torch.equal(actual.tokens, expected.tokens)
        assert (actual.logits - expected.logits).abs().max() <= SUMS
        assert all(cache.report().tiers.values()), "a tier is not used"
        if "budget" not in options:
            assert_sealed_in_prefill_and_decode(cache, max(PADDED))


class OffloadedOperations(CacheOperations):
    """The page table under any sequence of operations, in three tiers."""

    @initialize(
        page_size=st.integers(1, 5),
        window=st.integers(1, 6),
        router=st.sampled_from([None, "all"]),
        compressor=st.sampled_from([None, Scattered()]),
    )
    def make(self, page_size, window, router, compressor) -> None:
        super().make(page_size, window, router, compressor)
        for state in self.cache.states:
            state.pages.places = Alone(Offload(400, 400, "/tmp"), layers=1)


TestOffloadedOperations = OffloadedOperations.TestCase

TestOffloadedOperations.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("method", METHODS)
def test_limits_hold_whenever_pages_were_sealed(method, tmp_path, monkeypatch) -> None:
    model = tiny("mixtral")
    options = METHODS[method] | SMALL
    near = PiKVCache(model, **options)
    generate(model, prompt(model, PADDED), near, max_new_tokens=40)
    placement = Offload(limits(near), limits(near), tmp_path)
    cache = PiKVCache(model, placement=placement, **options)
    append, most = PageTable.append, Counter()

    def checked(table: PageTable, *args, **kwargs) -> None:
        append(table, *args, **kwargs)
        held = Counter()
        for layer in paged(cache):
            for slab in slabs_of(layer):
                held[slab.tier.name] += sum(t.nbytes for t in slab.fields.values())
        for name in held:
            most[name] = max(most[name], held[name])
        assert held["device"] <= placement.device_bytes
        assert held["ram"] <= placement.ram_bytes

    monkeypatch.setattr(PageTable, "append", checked)
    generate(model, prompt(model, PADDED), cache, max_new_tokens=40)
    assert set(most) == {"device", "ram", "disk"}
    assert most["device"] > placement.device_bytes / 2, "the device is left empty"


def test_report_and_nbytes(tmp_path) -> None:
    """Files are no memory held; what is in memory is counted as without offloading."""
    model = tiny("mixtral")
    inputs = prompt(model, (30,))
    caches = [
        PiKVCache(model, placement=placement, **SMALL)
        for placement in ("auto", "offload", Offload(0, 0, tmp_path))
    ]
    for cache in caches:
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    reports = [cache.report() for cache in caches]
    size = sum(reports[0].tiers.values())
    assert [report.tiers for report in reports] == [
        {"device": size, "ram": 0, "disk": 0},
        {"device": 0, "ram": size, "disk": 0},
        {"device": 0, "ram": 0, "disk": size},
    ]
    assert caches[0].nbytes == caches[1].nbytes == caches[2].nbytes + size
    for report, cache in zip(reports, caches, strict=True):
        assert sum(row.tiers.get("disk", 0) for row in report.layers) == report.tiers["disk"]
        assert report.nbytes == cache.nbytes
    assert "pages:" not in str(reports[0])
    assert "in RAM" in str(reports[1]) and "on disk" in str(reports[2])
    assert reports[2].to_dict()["tiers"]["disk"] == size


def test_room_that_rows_leave_is_used_again() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (60, 60))
    cache = PiKVCache(model, placement=Offload("40 KB"), **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    full = cache.report().tiers
    assert full["device"] > 30_000 and full["ram"] > 0
    cache.batch_select_indices(torch.tensor([1]))
    half = cache.report().tiers
    assert half == {name: nbytes // 2 for name, nbytes in full.items()}
    ids = prompt(model, (50,), seed=3)["input_ids"]
    forward(model, ids, torch.ones(1, 110, dtype=torch.long), cache)
    assert half["device"] + 10_000 < cache.report().tiers["device"] <= 40_000


@pytest.mark.parametrize(
    "way, cases",
    [
        ("plain", ["gpt_oss:int8"]),
        ("streams", ["mixtral:mixed", "deepseek_v3:default", "mixtral:snapkv", "mixtral:codes"]),
    ],
)
def test_far_pages_come_to_a_device(way, cases) -> None:
    """On a logical accelerator, in a process that may register one."""
    script = Path(__file__).parents[1].joinpath("offload_on_fakegpu.py")
    done = subprocess.run(
        [sys.executable, script, way, *cases],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
