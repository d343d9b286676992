"""A network that foretells attention: who stays by it, what it takes, and which file is refused."""

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import (
    FAMILIES,
    PADDED,
    SMALL,
    dynamic,
    forward,
    generate,
    held_by,
    paged,
    slabs_of,
    tiny,
)
from safetensors.torch import load_file
from test_schedulers import assert_same_best, kept
from torch import Tensor
from transformers import PreTrainedModel
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.fitting.resumable import write
from pikv_hf.model.artifact import METADATA, ModelIdentity
from pikv_hf.schedulers import AdaKV, PiKVQuest
from pikv_hf.schedulers.duo import PROFILE

OPEN, BUDGET = 5, 20


def file_of(model: PreTrainedModel, path: Path, seed: int = 0, heads: int | None = None) -> Path:
    """Networks of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with PiKVCache(model) as cache:
        forward(model, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), cache)
        for layer in paged(cache):
            tail = layer.state.tail
            dims, count = tail.keys.shape[3] + tail.values.shape[3], heads or tail.keys.shape[1]
            shapes = {"hidden": (count, dims, 6), "bias": (count, 6), "out": (count, 6)}
            for name, shape in shapes.items():
                numbers = torch.randn(shape, generator=generator)
                tensors[f"pikv_quest.{layer.state.layer_idx}.{name}"] = numbers
    metadata = {"model": asdict(ModelIdentity.of(model)), "job": {"methods": ["pikv_quest"]}}
    write(path, tensors, metadata)
    return path


# ---- who stays ----------------------------------------------------------------------------------


def states_without_positions(model, ids: Tensor) -> list[Tensor]:
    """Keys before their rotary embedding and values of one row, [H, T, 2 D], by layer."""
    found: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args, out: found.__setitem__(name, out)

    hooks = []
    for idx, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            hooks.append(projection.register_forward_hook(keep(f"{idx}.{name}")))
    forward(model, ids, torch.ones_like(ids), dynamic(model))
    for hook in hooks:
        hook.remove()
    heads = model.config.num_key_value_heads
    parts = [
        [
            found[f"{i}.{n}"][0].unflatten(-1, (heads, -1)).transpose(0, 1)
            for n in ("k_proj", "v_proj")
        ]
        for i in range(len(model.model.layers))
    ]
    return [torch.cat(pair, dim=-1).double() for pair in parts]


@pytest.mark.parametrize("lengths", [(60,), (60, 52, 33)], ids=["one_row", "left_padded"])
def test_kept_set(lengths, tmp_path) -> None:
    """MLP([K, V]) of each token by itself, K as it is before the rotary embedding."""
    model = tiny("mixtral", num_hidden_layers=2)
    path = file_of(model, tmp_path / "q")
    networks = load_file(path)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"budget": BUDGET + OPEN, "page_size": 1, "window": OPEN}
    cache = PiKVCache(model, scheduler=PiKVQuest(path), **options)
    forward(model, ids, mask, cache)
    for row, length in enumerate(lengths):
        pad = 60 - length
        states = states_without_positions(model, ids[row : row + 1, pad:])
        for layer, held in enumerate(kept(cache, row)):
            part = {
                n: networks[f"pikv_quest.{layer}.{n}"].double() for n in ("hidden", "bias", "out")
            }
            for head, found in enumerate(held):
                rows = [
                    (
                        part["out"][head] * (x @ part["hidden"][head] + part["bias"][head]).relu()
                    ).sum()
                    for x in states[layer][head, : length - OPEN]
                ]
                scores = torch.stack(rows)
                best = set(scores.topk(BUDGET).indices.tolist())
                assert_same_best({at - pad for at in found}, best, scores)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_as_alone(name, tmp_path) -> None:
    """Latents, sinks, partly rotary keys: padding, pieces and later steps change nothing."""
    model = tiny(name)
    path = file_of(model, tmp_path / "q")
    inputs = prompt(model, (60, 47))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"budget": BUDGET + OPEN, "page_size": 1, "window": OPEN}
    cache = PiKVCache(model, scheduler=PiKVQuest(path), hold_prompt=True, **options)
    for start, end in ((0, 30), (30, 50), (50, 51), (51, 60)):
        forward(model, ids[:, start:end], mask[:, :end], cache)
    alone = PiKVCache(model, scheduler=PiKVQuest(path), hold_prompt=True, **options)
    row = ids[1:, 13:]
    for start, end in ((0, 37), (37, 38), (38, 47)):
        forward(model, row[:, start:end], torch.ones(1, end), alone)
    padded = [[{at - 13 for at in head} for head in heads] for heads in kept(cache, 1)]
    assert padded == kept(alone, 0)
    assert {at for heads in padded for head in heads for at in head} & set(range(20))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wrap", [lambda s: s, AdaKV], ids=["plain", "adakv"])
def test_generate(name, wrap, tmp_path) -> None:
    model = tiny(name)
    scheduler = wrap(PiKVQuest(file_of(model, tmp_path / "q")))
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model))
    everything = PiKVCache(model, scheduler=scheduler, budget=1000, **SMALL)
    assert torch.equal(generate(model, inputs, everything).tokens, expected.tokens)
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 16}):
        cache = PiKVCache(model, scheduler=scheduler, budget=16, compressor="int8", **SMALL)
        generate(model, inputs, cache, **options)
        for layer in paged(cache):
            assert 0 < float(held_by(layer, 0).double().mean()) <= 16 - SMALL["window"]


def test_networks_count_as_bytes_once_for_all_copies(tmp_path) -> None:
    model = tiny("mixtral")
    scheduler = PiKVQuest(file_of(model, tmp_path / "q"))
    size = sum(t.nbytes for t in load_file(tmp_path / "q").values())
    inputs = prompt(model, (60,))
    held, caches = [], []
    for method in (scheduler, AdaKV(scheduler), "random"):
        caches.append(PiKVCache(model, scheduler=method, budget=24, **SMALL))
        forward(model, inputs["input_ids"], inputs["attention_mask"], caches[-1])
        held.append(caches[-1].nbytes)
    slabs = [slab for layer in paged(caches[0]) for slab in slabs_of(layer)]
    size += sum(slab.meta["constant"].nbytes for slab in slabs)
    frequencies = [state.rotary.frequencies for state in caches[0].states]
    size += sum({t.data_ptr(): t.nbytes for t in frequencies}.values())
    assert held[0] - held[2] == size and held[1] >= held[2] + size
    for other in (caches[0].fork(2), copy.deepcopy(caches[0])):
        mine, theirs = ([*c.settings.scheduler.tensors(0)] for c in (caches[0], other))
        assert [t.data_ptr() for t in mine] == [t.data_ptr() for t in theirs] != []
    with pytest.raises(ValueError, match="`budget` is .* bytes.* leaves"):
        small = PiKVCache(model, scheduler=scheduler, budget=f"{size}B", **SMALL)
        forward(model, inputs["input_ids"], inputs["attention_mask"], small)


def test_a_saved_cache(tmp_path) -> None:
    model = tiny("mixtral")
    path = file_of(model, tmp_path / "q")
    ids = prompt(model, (60,))["input_ids"]
    cache = PiKVCache(model, scheduler=PiKVQuest(path), budget=24, **SMALL)
    forward(model, ids[:, :40], torch.ones(1, 40), cache)
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False).attach(model)
    logits = [forward(model, ids[:, 40:], torch.ones(1, 60), each) for each in (cache, loaded)]
    assert torch.equal(*logits)


# ---- what is refused ----------------------------------------------------------------------------


def test_refusals(tmp_path) -> None:
    model = tiny("mixtral")
    path = file_of(model, tmp_path / "q")
    with pytest.raises(ValueError, match="pikv calibrate --method pikv_quest"):
        PiKVCache(model, scheduler="pikv_quest", budget=0.5)
    with pytest.raises(ValueError, match="pikv calibrate --method pikv_quest"):
        PiKVCache(model, scheduler=AdaKV(PiKVQuest()), budget=0.5)
    with pytest.raises(ValueError, match="`calibration` is '/no/such'; there is no such file"):
        PiKVQuest("/no/such")
    with pytest.raises(TypeError, match="`calibration` is 3"):
        PiKVQuest(3)
    write(tmp_path / "heads", {}, {}, PROFILE.key)
    with pytest.raises(ValueError, match="no file that `pikv calibrate` made"):
        PiKVQuest(tmp_path / "heads")
    metadata = {"model": asdict(ModelIdentity.of(model)), "job": {"methods": ["lowrank"]}}
    write(tmp_path / "other", {}, metadata, METADATA)
    with pytest.raises(ValueError, match="was made for lowrank, not for pikv_quest"):
        PiKVCache(model, scheduler=PiKVQuest(tmp_path / "other"), budget=0.5)
    with pytest.raises(ValueError, match="`calibration` .* was made for .*: its weight"):
        PiKVCache(build("mixtral", seed=9), scheduler=PiKVQuest(path), budget=0.5)
    with pytest.raises(ValueError, match="its model type is olmoe"):
        PiKVCache(tiny("olmoe"), scheduler=PiKVQuest(path), budget=0.5)
    with pytest.raises(ValueError, match="needs a `budget`"):
        PiKVCache(model, scheduler=PiKVQuest(path))


def test_networks_of_other_heads(tmp_path) -> None:
    """As if they were made by hand."""
    model = tiny("deepseek_v3")
    scheduler = PiKVQuest(file_of(model, tmp_path / "q", heads=2))
    ids = prompt(model, (60,))["input_ids"]
    cache = PiKVCache(model, scheduler=scheduler, budget=16, **SMALL)
    with pytest.raises(ValueError, match="has 2 KV heads for layer 0, but the cache has 1"):
        forward(model, ids, torch.ones_like(ids), cache)
