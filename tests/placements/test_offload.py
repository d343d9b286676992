"""Pages beyond the device: the same results, bytes by tier, files that vanish."""

import copy
import errno
import os
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
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
    forward,
    generate,
    paged,
    slabs_of,
    spans_of,
    tail_length,
    tiny,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_compressors import exact_model
from test_pages import CacheOperations
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.from_text import parse_cache
from pikv_hf.placements import Offload
from pikv_hf.storage import tiers
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


def mapped(folder: Path) -> int:
    """Bytes of files in `folder` that this process has mapped."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            total += end - start
    return total


def number_of_maps(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


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
        assert (actual.logits - expected.logits).abs().max() <= 1e-5
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
            state.pages.place = partial(Offload(400, 400, "/tmp").place, layers=1)


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


def test_files_are_nameless_and_vanish_with_the_pages(tmp_path) -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (30, 30))
    cache = PiKVCache(model, placement=Offload(0, 0, tmp_path), **SMALL)
    generate(model, inputs, cache)
    full = mapped(tmp_path)
    assert full >= cache.report().tiers["disk"] > 0
    assert not list(tmp_path.iterdir())
    fork = cache.fork(2)
    assert mapped(tmp_path) == full, "a fork copies pages"
    del fork
    cache.batch_select_indices(torch.tensor([1]))
    assert 0 < mapped(tmp_path) < full
    cache.crop(-20)
    less = cache.report().tiers["disk"]
    cache.reset()
    assert less > 0 and mapped(tmp_path) == 0
    generate(model, inputs, cache)
    assert mapped(tmp_path) > 0
    del cache
    assert mapped(tmp_path) == 0


@pytest.mark.parametrize("method", ["lossless", "mixed"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "fork"])
def test_copies_live_in_the_same_tiers(method, way, tmp_path) -> None:
    model = tiny("mixtral")
    inputs = prompt(model, PADDED)
    options = METHODS[method] | SMALL
    expected = generate(model, inputs, PiKVCache(model, **options), max_new_tokens=30)
    cache = PiKVCache(model, placement=Offload(9000, 9000, tmp_path), **options)
    generate(model, inputs, cache)
    before = cache.report().tiers
    assert all(before.values())
    if way == "pickle":
        copied = pickle.loads(pickle.dumps(cache)).attach(model)
    else:
        copied = copy.deepcopy(cache) if way == "deepcopy" else cache.fork()
    on_disk = mapped(tmp_path)
    cache.reset()
    assert copied.report().tiers == before
    assert (mapped(tmp_path) == on_disk) == (way == "fork")
    inputs = {"input_ids": expected.tokens[:, : max(PADDED) + 14]}
    mask = prompt(model, PADDED)["attention_mask"]
    inputs["attention_mask"] = torch.cat([mask, torch.ones(3, 14, dtype=mask.dtype)], dim=1)
    actual = generate(model, inputs, copied, max_new_tokens=16)
    assert torch.equal(actual.tokens, expected.tokens)


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


def test_the_next_layers_files_are_read_ahead(tmp_path, monkeypatch) -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (30,))
    cache = PiKVCache(model, placement=Offload(0, 0, tmp_path), **SMALL)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    announced, read_ahead = [], tiers.Disk.read_ahead

    def record(tier, tensors) -> None:
        tensors = list(tensors)
        announced.extend(t.data_ptr() for t in tensors)
        read_ahead(tier, tensors)

    monkeypatch.setattr(tiers.Disk, "read_ahead", record)
    ids = inputs["input_ids"][:, :1]
    forward(model, ids, torch.ones(1, 31, dtype=torch.long), cache)
    layers = paged(cache)
    expected = [
        t.data_ptr()
        for layer in [*layers[1:], layers[0]]
        for slab in slabs_of(layer)
        for t in slab.fields.values()
    ]
    assert announced == expected


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, monkeypatch) -> None:
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = tiny("mixtral")
    inputs = prompt(model, (30,))
    cache = PiKVCache(model, placement=Offload(0, 0, tmp_path), **SMALL)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=rf"`offload_folder` '{tmp_path}' cannot hold .*: No space left"
    ):
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes_is_named(tmp_path) -> None:
    model, folder = tiny("mixtral"), tmp_path / "pages"
    folder.mkdir()
    inputs = prompt(model, (30,))
    cache = PiKVCache(model, placement=Offload(0, 0, folder), **SMALL)
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match=rf"'{folder}' cannot hold \d+ more bytes of pages"):
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)


@pytest.mark.parametrize("compressor", [None, Scattered()], ids=str)
def test_files_grow_with_the_logarithm_of_the_tokens(compressor, tmp_path) -> None:
    """Tokens come one page at a time, as they are generated."""
    model = tiny("mixtral")
    placement = Offload(0, 0, tmp_path)
    cache = PiKVCache(model, placement=placement, compressor=compressor, page_size=4, window=4)
    layer, counts = paged(cache)[0], []
    for tokens in (200, 800, 3200):
        while layer.state.num_seen < tokens:
            layer.update(*torch.randn(2, 1, 2, 4, 16))
            layer.finish(None)
        counts.append(number_of_maps(tmp_path))
    fields = max(len(slab.fields) for slab in slabs_of(layer))
    kinds = 2 if isinstance(compressor, Scattered) else 1
    # log(4) / log(1.5) = 3.4 times as many pages with half as many more.
    assert counts[0] > 0 and counts[2] - counts[1] <= 4 * fields * kinds
    used = sum(slab.page_count for slab in slabs_of(layer)) * 4
    assert used == 2 * (layer.state.num_seen - tail_length(layer))
    held = sum(span["keys"].shape[2] for span in spans_of(layer, [0]))
    assert held == layer.state.num_seen - tail_length(layer)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device_bytes": -1}, r"`device_bytes` is -1; it must be a number of bytes"),
        ({"device_bytes": True}, r"`device_bytes` is True"),
        ({"device_bytes": None}, r"`device_bytes` is None"),
        ({"device_bytes": 0.5}, r"`device_bytes` is 0.5"),
        ({"device_bytes": "half"}, r"`device_bytes` is 'half'.*'2GiB'"),
        ({"ram_bytes": "2", "offload_folder": "/tmp"}, r"`ram_bytes` is '2'"),
        ({"ram_bytes": 5}, r"`ram_bytes` is 5 and `offload_folder` is None"),
        ({"offload_folder": "/tmp"}, r"`ram_bytes` is None and `offload_folder` is '/tmp'"),
        (
            {"ram_bytes": 0, "offload_folder": "/nowhere"},
            r"`offload_folder` is '/nowhere'; it must be a folder that exists",
        ),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Offload(**arguments)


def test_without_a_model_there_are_no_pages_to_place() -> None:
    with pytest.raises(ValueError, match=r"`placement`.*PiKVCache\(model"):
        PiKVCache(config=tiny("mixtral").config, placement="offload")


def test_on_the_command_line() -> None:
    option = parse_cache("compressor=int8,placement=offload(device_bytes='2MiB')")
    assert option.arguments["placement"] == Offload("2MiB")
    option = parse_cache("placement=offload(ram_bytes=0, offload_folder='/tmp')")
    cache = option.make(tiny("mixtral"))
    assert cache.settings.placement == Offload(0, 0, "/tmp")
    with pytest.raises(ValueError, match="`placement` is offload"):
        parse_cache("placement=offload(gpu_bytes=3)")


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
