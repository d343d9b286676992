"""Calibrated on some text, errors are smaller on other text: the bundled model, and latents."""

from pathlib import Path

import pytest
import torch
from calibrations import KINDS, made, needle_text, pieces_of
from helpers import tiny
from torch import Tensor

from pikv_hf.compressors import Distill, LowRank
from pikv_hf.fitting.calibrate import calibrate, text_pieces
from pikv_hf.fitting.calibration_job import METHODS, Job
from pikv_hf.fitting.capture import Observer
from pikv_hf.model.artifact import read_metadata

NEEDLES = Job(rank=8, length=447, windows=16, steps=300)


@pytest.fixture(scope="module")
def calibrations(bundled, tmp_path_factory) -> dict[str, Path]:
    """Untrained and trained, on 24 haystacks."""
    folder = tmp_path_factory.mktemp("needles")
    (folder / "train.txt").write_text(needle_text(1000, 24))
    paths = {}
    for name, steps in (("untrained", 0), ("trained", NEEDLES.steps)):
        job = Job(rank=8, length=447, windows=16, steps=steps)
        pieces = text_pieces(bundled[1], [folder / "train.txt"], job.piece_tokens)
        paths[name] = folder / f"{name}.safetensors"
        calibrate(bundled[0], pieces, paths[name], job)
    return paths


@pytest.fixture(scope="module")
def held_out(bundled, tmp_path_factory) -> Observer:
    """Windows of haystacks with other seeds."""
    path = tmp_path_factory.mktemp("held_out") / "test.txt"
    path.write_text(needle_text(900_000, 6))
    observer = Observer(bundled[0], NEEDLES.length, windows=99)
    for piece in text_pieces(bundled[1], [path], NEEDLES.piece_tokens):
        observer.read(piece)
    observer.close()
    return observer


def output_error(observer: Observer, compressor: LowRank) -> float:
    """Of attention over compressed pages and the newest eighth of the keys as it is, in float64."""
    config, change, size = observer.model.config, 0.0, 0.0
    for idx, layer in observer.captured.layers.items():
        bound = compressor.bind(config, idx)
        for window in (*layer.fitted, *layer.held_out):
            query, *states = (t.double()[None] for t in window)
            sealed = states[0].shape[2] * 7 // 8 // 16 * 16
            pages = [t[:, :, :sealed].unflatten(2, (-1, 16)) for t in states]
            near = [
                torch.cat([page.flatten(2, 3), exact[:, :, sealed:]], dim=2)
                for page, exact in zip(bound.decode(bound.encode(*pages)), states, strict=True)
            ]
            exact, changed = (exact_output(query, *kv, layer.scale) for kv in (states, near))
            change += (changed - exact).square().sum().item()
            size += exact.square().sum().item()
    return (change / size) ** 0.5


def exact_output(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return (query @ keys.mT * scale).softmax(-1) @ (values if values.shape[-1] else keys)


@KINDS
def test_training_helps_attention_on_other_text(kind, calibrations, held_out) -> None:
    errors = {
        name: output_error(held_out, kind(calibration=path)) for name, path in calibrations.items()
    }
    assert 0.1 < errors["untrained"] < 0.7
    assert errors["trained"] < 0.92 * errors["untrained"], errors


def test_training_helps_latents(tmp_path) -> None:
    """A random model of latent attention, random tokens."""
    model = tiny("deepseek_v3")
    job = Job(length=128, windows=64, steps=150)
    path = made(model, tmp_path, job, count=84)
    (tmp_path / "plain").mkdir()
    plain = made(model, tmp_path / "plain", Job(length=128, windows=64, steps=0), count=84)
    observer = Observer(model, 128, windows=99)
    for piece in pieces_of(model, 16, job, seed=77):
        observer.read(piece)
    observer.close()
    for kind in METHODS.values():
        trained, untrained = (
            output_error(observer, kind(calibration=file)) for file in (path, plain)
        )
        assert trained < 0.99 * untrained < 0.6


def test_the_errors_in_the_file_are_those_of_held_out_text(calibrations, held_out) -> None:
    written = read_metadata(calibrations["trained"])["held_out_errors"]
    for kind in METHODS.values():
        before, after = zip(*written[kind.name].values(), strict=True)
        measured = output_error(held_out, kind(calibration=calibrations["trained"]))
        assert min(after) * 0.8 < measured < max(after) * 1.2
        assert all(a < b for a, b in zip(after, before, strict=True))


def test_distill_is_better_than_what_it_begins_with(calibrations, held_out) -> None:
    """Its hidden units are used, and without them the error is larger."""
    trained = Distill(calibration=calibrations["trained"])
    error = output_error(held_out, trained)

    class Dropped(Distill):
        def bind(self, config, layer_idx):
            factors = dict(super().bind(config, layer_idx)._factors)
            for name in ("key", "value"):
                up = factors[f"{name}_up"].clone()
                up[:, factors[f"{name}_down"].shape[-1] :] = 0
                factors[f"{name}_up"] = up
            return Distill.with_factors(self, factors)

    assert error < output_error(held_out, Dropped(calibration=calibrations["trained"]))
