"""Pages on disk: files without names, which grow seldom, are read ahead and vanish; a full disk."""

import copy
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import (
    PADDED,
    SMALL,
    Scattered,
    forward,
    generate,
    paged,
    slabs_of,
    spans_of,
    tail_length,
    tiny,
)
from test_offload import METHODS
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.placements import Offload
from pikv_hf.storage import tiers


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
    cache = PiKVCache(model, placement=Offload(14000, 14000, tmp_path), **options)
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
            layer.finish()
        counts.append(number_of_maps(tmp_path))
    fields = max(len(slab.fields) for slab in slabs_of(layer))
    kinds = 2 if isinstance(compressor, Scattered) else 1
    # log(4) / log(1.5) = 3.4 times as many pages with half as many more.
    assert counts[0] > 0 and counts[2] - counts[1] <= 4 * fields * kinds
    used = sum(slab.page_count for slab in slabs_of(layer)) * 4
    assert used == 2 * (layer.state.num_seen - tail_length(layer))
    held = sum(span["keys"].shape[2] for span in spans_of(layer, [0]))
    assert held == layer.state.num_seen - tail_length(layer)
