"""A network that foretells attention: what it reads, what it learns, which file is taken."""

import copy
import math
from dataclasses import asdict, replace
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
from test_calibrate import needle_text, pieces_of, pikv
from test_schedulers import assert_same_best, kept
from torch import Tensor
from transformers import PreTrainedModel
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.attach.binding import binding_of
from pikv_hf.fitting import calibrate as run
from pikv_hf.fitting.calibrate import calibrate, text_pieces
from pikv_hf.fitting.calibration_job import Job
from pikv_hf.fitting.capture import QUERIES, Observer
from pikv_hf.fitting.resumable import write
from pikv_hf.model import loading
from pikv_hf.model.artifact import METADATA, ModelIdentity, read_metadata
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack
from pikv_hf.schedulers import AdaKV, Candidates, KeyDiff, Knorm, PiKVQuest, Random, Scheduler
from pikv_hf.schedulers.duo import PROFILE

OPEN, BUDGET = 5, 20
TINY = Job(("pikv_quest",), length=40, windows=4, steps=4)


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


# ---- the bundled model, on text that was not calibrated with ------------------------------------

LENGTH = 447
STEPS = 300


def asked_text(first: int, count: int, length: int = LENGTH + 1 + QUERIES) -> list[str]:
    """Haystacks with the questions and answers behind them, about `length` tokens each."""
    stacks = [make_haystack(length=length - 118, needles=8, seed=first + i) for i in range(count)]
    return [
        " ".join([s.text, *(f"{q} {a} ." for q, a in zip(s.questions, s.answers, strict=True))])
        for s in stacks
    ]


@pytest.fixture(scope="module")
def bundled():
    return loading.load(str(NEEDLE_MODEL))


@pytest.fixture(scope="module")
def calibrations(bundled, tmp_path_factory) -> dict[str, Path]:
    """Untrained and trained, on 40 haystacks; and networks that were never trained."""
    folder = tmp_path_factory.mktemp("quest")
    (folder / "train.txt").write_text("\n".join(asked_text(1000, 40)))
    paths = {"random": file_of(bundled[0], folder / "random.safetensors")}
    for name, steps in (("untrained", 0), ("trained", STEPS)):
        job = Job(("pikv_quest",), length=LENGTH, windows=32, steps=steps)
        pieces = text_pieces(bundled[1], [folder / "train.txt"], job.piece_tokens)
        paths[name] = folder / f"{name}.safetensors"
        calibrate(bundled[0], pieces, paths[name], job)
    return paths


def held_out(bundled, length: int, count: int = 8) -> Observer:
    """Windows of haystacks with other seeds, of this many tokens."""
    model, tokenizer = bundled
    observer = Observer(model, length, windows=99)
    tokens = length + 1 + QUERIES
    for text in asked_text(900_000, count, tokens):
        ids = tokenizer(text, return_tensors="pt").input_ids
        observer.read(ids[:, -tokens:])
    observer.close()
    return observer


def kept_mass(observer: Observer, scheduler: Scheduler) -> float:
    """The share of the attention to all tokens but the newest eighth that a quarter of them gets."""
    shares = []
    for idx, layer in observer.captured.layers.items():
        rotary = binding_of(observer.model).rotaries[idx]
        for window in (*layer.fitted, *layer.held_out):
            length = window.keys.shape[1]
            old = length - length // 8
            attention = (window.query @ window.keys.mT * layer.scale).softmax(-1).mean(1)[:, :old]
            keys, values = (states[None] for states in window[1:])
            tokens = Candidates(
                positions=torch.arange(old).expand(1, len(attention), -1),
                keys=keys[:, :, :old],
                values=values[:, :, :old],
                open_keys=keys[:, :, old:],
                open_values=values[:, :, old:],
                seen=length,
                layer_idx=idx,
                scale=layer.scale,
                rotary=rotary,
            )
            if scheduler.needs.constants:
                tokens = replace(tokens, constants=scheduler.constants(tokens))
            found = attention.gather(1, scheduler.keep(tokens, old // 4)[0])
            shares.append((found.sum(1) / attention.sum(1)).mean())
    return torch.stack(shares).mean().item()


@pytest.mark.parametrize("length", [200, LENGTH, 1000])
def test_it_foretells_attention_on_other_text(length, bundled, calibrations) -> None:
    """At a quarter of the tokens; in other lengths too, where keys have turned by other angles."""
    observer = held_out(bundled, length)
    schedulers = {name: PiKVQuest(path) for name, path in calibrations.items()}
    schedulers |= {"chance": Random(), "keydiff": KeyDiff(), "knorm": Knorm()}
    mass = {name: kept_mass(observer, scheduler) for name, scheduler in schedulers.items()}
    trained = mass.pop("trained")
    assert 0.2 < mass["chance"] < 0.3
    assert all(trained > other + 0.04 for other in mass.values()), (trained, mass)
    assert trained > 1.6 * mass["chance"] and trained > 1.3 * mass["random"]


def test_the_loss_falls_below_that_of_equal_shares(bundled, calibrations) -> None:
    """Measured here as the file says, on text of the calibration that was not trained on."""
    observer = held_out(bundled, LENGTH)
    written = read_metadata(calibrations["trained"])["held_out_errors"]["pikv_quest"]
    for idx, layer in observer.captured.layers.items():
        networks = [
            PiKVQuest(calibrations[name])._networks[idx] for name in ("untrained", "trained")
        ]
        found = [divergences(layer, n, binding_of(bundled[0]).rotaries[idx]) for n in networks]
        assert found[1] < 0.8 * found[0]
        for mine, theirs in zip(found, written[str(idx)], strict=True):
            assert mine == pytest.approx(theirs, rel=0.2)
    assert all(before == after for before, after in errors_of(calibrations["untrained"]))


def errors_of(path: Path) -> list[list[float]]:
    return [*read_metadata(path)["held_out_errors"]["pikv_quest"].values()]


def divergences(layer, network, rotary) -> float:
    """Sum of p log(p / q) over tokens, the mean over KV heads and windows, in float64."""
    found = []
    for query, keys, values in (*layer.fitted, *layer.held_out):
        old = keys.shape[1] - keys.shape[1] // 8
        p = (query @ keys.mT * layer.scale).double().softmax(-1).mean(1)[:, :old]
        p = p / p.sum(-1, keepdim=True)
        free = torch.cat([rotary.unrotate(keys, torch.arange(keys.shape[1])), values], -1)[:, :old]
        units = torch.einsum("htd,hdm->htm", free, network["hidden"]) + network["bias"][:, None]
        q = torch.einsum("htm,hm->ht", units.clamp_min(0), network["out"]).double().softmax(-1)
        found.append((p * (p / q).log()).sum(-1).mean())
    return torch.stack(found).mean().item()


def test_without_training_all_tokens_are_alike(calibrations, bundled) -> None:
    """Then the newest stay."""
    model, tokenizer = bundled
    ids = tokenizer(asked_text(7, 1)[0], return_tensors="pt").input_ids[:, :200]
    options = {"budget": 40, "page_size": 1, "window": 10}
    cache = PiKVCache(model, scheduler=PiKVQuest(calibrations["untrained"]), **options)
    forward(model, ids, torch.ones_like(ids), cache)
    assert all(head == set(range(160, 190)) for heads in kept(cache, 0) for head in heads)


# ---- what is written, and when it is interrupted ------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_interrupted_and_again(name, tmp_path, monkeypatch) -> None:
    """The same file as without a break, with compressors beside it; every number of it finite."""
    model = tiny(name)
    job = replace(TINY, methods=("lowrank", "pikv_quest"))
    pieces = pieces_of(model, 6, job)
    calibrate(model, pieces, tmp_path / "whole", job)
    fits = iter([run.fit_utility])

    def once(*args):
        return next(fits, interrupted)(*args)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit_utility", once)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, pieces, tmp_path / "cal", job)
    found = calibrate(model, pieces, tmp_path / "cal", job)
    assert (tmp_path / "cal").read_bytes() == (tmp_path / "whole").read_bytes()
    assert all(t.isfinite().all() for t in load_file(tmp_path / "cal").values())
    layers = len(paged(PiKVCache(model)))
    assert len(found["pikv_quest"]) == len(found["lowrank"]) == layers
    assert all(math.isfinite(fit.after) for fit in found["pikv_quest"].values())
    PiKVCache(model, scheduler=PiKVQuest(tmp_path / "cal"), budget=0.5).detach()


def test_command(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(needle_text(0, 3))
    path = tmp_path / "q.safetensors"
    options = ("--length", "200", "--steps", "2", "--method", "pikv_quest")
    result = pikv("calibrate", "--text", tmp_path / "a.txt", *options, "--out", path)
    assert result.exit_code == 0, result.output
    assert "divergence" in result.stdout and "equal shares" in result.stdout
    assert "compressor" not in result.stdout
    (tmp_path / "prompt.txt").write_text(make_haystack(length=400, seed=1).prompt())
    option = f"scheduler=pikv_quest(calibration={str(path)!r}),budget=0.5"
    result = pikv("generate", "--prompt-file", tmp_path / "prompt.txt", "--cache", option)
    assert result.exit_code == 0, result.output


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


def test_angles_that_change_with_the_length(tmp_path) -> None:
    """Refused before a text is read; nothing is written."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("mixtral", rope_parameters=rope)
    with pytest.raises(ValueError, match="'dynamic', whose angles change"):
        calibrate(model, iter([None]), tmp_path / "cal", TINY)
    assert not [*tmp_path.iterdir()]
