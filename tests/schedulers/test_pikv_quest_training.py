"""A network learns on some text to foretell attention on other text; how its file is made."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrations import needle_text, pieces_of
from command_line import pikv
from helpers import forward, paged, tiny
from safetensors.torch import load_file
from test_pikv_quest import file_of
from test_schedulers import kept
from zoo import build

from pikv_hf import PiKVCache
from pikv_hf.attach.binding import binding_of
from pikv_hf.fitting import calibrate as run
from pikv_hf.fitting.calibrate import calibrate, text_pieces
from pikv_hf.fitting.calibration_job import Job
from pikv_hf.fitting.capture import QUERIES, Observer
from pikv_hf.model.artifact import read_metadata
from pikv_hf.needles.haystack import make_haystack
from pikv_hf.schedulers import Candidates, KeyDiff, Knorm, PiKVQuest, Random, Scheduler

TINY = Job(("pikv_quest",), length=40, windows=4, steps=4)
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


def test_angles_that_change_with_the_length(tmp_path) -> None:
    """Refused before a text is read; nothing is written."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build("mixtral", rope_parameters=rope)
    with pytest.raises(ValueError, match="'dynamic', whose angles change"):
        calibrate(model, iter([None]), tmp_path / "cal", TINY)
    assert not [*tmp_path.iterdir()]
