"""A cache with a calibrated compressor: its bytes, copies, schedulers, heads, and bad numbers."""

import copy

import pytest
import torch
from calibrations import KINDS, made
from helpers import SMALL, assert_close, forward, paged, slabs_of, tiny
from safetensors.torch import load_file
from test_combinations import assert_reads_what_was_kept, one_layer
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.schedulers import AdaKV, SnapKV, StreamingLLM


@KINDS
def test_weights_are_counted_once(kind, tmp_path) -> None:
    model = tiny("mixtral")
    path = made(model, tmp_path)
    factors = load_file(path)
    mine = {k: t for k, t in factors.items() if k.startswith(f"{kind.name}.")}
    with PiKVCache(model, compressor=kind(calibration=path), **SMALL) as cache:
        assert cache.nbytes == sum(t.numel() * t.element_size() for t in mine.values()) > 0
        empty = cache.nbytes
        forward(model, prompt(model, (40,))["input_ids"], torch.ones(1, 40), cache)
        layer = paged(cache)[1]
        held = sum(t.nbytes for t in layer.state.pages.codec.tensors())
        assert held == sum(t.nbytes for k, t in mine.items() if k.startswith(f"{kind.name}.1."))
        assert cache.report().layers[1].nbytes > held and cache.nbytes > empty
        cache.reset()
        assert cache.nbytes == empty


@KINDS
def test_saved_and_loaded(kind, tmp_path) -> None:
    """A saved cache carries its projections: the file is not needed any more."""
    model = tiny("mixtral")
    path = made(model, tmp_path)
    ids = prompt(model, (60,))["input_ids"]
    logits = []
    cache = PiKVCache(model, compressor=kind(calibration=path), **SMALL)
    forward(model, ids[:, :40], torch.ones(1, 40), cache)
    torch.save(cache, tmp_path / "cache.pt")
    path.unlink()
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False).attach(model)
    for each in (cache, copy.deepcopy(cache), loaded):
        logits.append(forward(model, ids[:, 40:], torch.ones(1, 60), each))
        each.detach()
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@KINDS
@pytest.mark.parametrize("router", [None, "all"])
def test_with_a_scheduler(kind, router, tmp_path) -> None:
    """What streaming keeps is what a cache without a scheduler holds of the same tokens."""
    model = tiny("mixtral")
    path = made(model, tmp_path)
    ids = prompt(model, (90,))["input_ids"]
    held = []
    for scheduler in (None, StreamingLLM(sinks=4, window=16)):
        options = {"compressor": kind(calibration=path), "scheduler": scheduler, "router": router}
        with PiKVCache(model, **options, **SMALL) as cache:
            # In one piece, so that both read the same; then sealed again and again.
            forward(model, ids[:, :60], torch.ones(1, 60), cache)
            layer = paged(cache)[0]
            first = torch.cat(
                [s.span([0], with_values=False)["keys"] for s in slabs_of(layer)], dim=2
            )
            held.append(first[:, :, :4])
    assert_close(held[1], held[0])


@KINDS
def test_heads_of_different_lengths(kind, tmp_path) -> None:
    """Each head is read by its own projections, however many tokens it holds."""
    path = made(one_layer(), tmp_path)
    scheduler = AdaKV(SnapKV(window_size=6, kernel_size=3))
    assert assert_reads_what_was_kept(scheduler, kind(calibration=path))


@KINDS
@pytest.mark.parametrize("part", [0, 1])
def test_numbers_that_have_no_code(kind, part, tmp_path) -> None:
    model = tiny("mixtral")
    with PiKVCache(model, compressor=kind(calibration=made(model, tmp_path)), **SMALL) as cache:
        layer = paged(cache)[1]
        pair = [torch.randn(1, 2, 16, 16) for _ in range(2)]
        pair[part][0, 1, 5, 3] = float("inf")
        layer.update(*pair)
        named = f"layer 1: {kind.name} cannot store {['key', 'value'][part]}s that are NaN or inf"
        with pytest.raises(ValueError, match=named):
            layer.finish()
