"""Calibration fits projections: principal axes, which training may only improve."""

import torch
from calibrations import FAMILIES, KINDS, cached_states, made, pieces_of
from helpers import tiny
from safetensors.torch import load_file
from tolerances import FITTED, SUMS
from torch import Tensor

from pikv_hf.compressors import LowRank, LowRankAffine
from pikv_hf.fitting.calibrate import calibrate
from pikv_hf.fitting.calibration_job import Job
from pikv_hf.fitting.capture import HELD_OUT


def centred(states: Tensor, kind: type[LowRank]) -> Tensor:
    return states - states.mean(1, keepdim=True) if kind is not LowRank else states


@KINDS
@FAMILIES
def test_untrained_error_is_that_of_the_principal_axes(kind, family, tmp_path) -> None:
    """On the texts of the calibration: the tail of the singular values of all keys, and values."""
    model = tiny(family)
    job = Job(methods=(kind.name,), rank=5, length=24, steps=0)
    pieces = pieces_of(model, 6, job)
    path = tmp_path / "cal.safetensors"
    calibrate(model, pieces, path, job)
    fitted = [cached_states(model, p, 24) for i, p in enumerate(pieces) if i % HELD_OUT != 1]
    for idx in range(len(fitted[0])):
        compressor = kind(calibration=path).bind(model.config, idx)
        keys, values = (torch.cat([f[idx][i] for f in fitted], dim=1).double() for i in range(2))
        pages = [states.unflatten(1, (-1, 8))[None] for states in (keys, values)]
        decoded = compressor.decode(compressor.encode(*pages))
        for states, page, back in zip((keys, values), pages, decoded, strict=True):
            if states.shape[-1]:
                error = (page - back).square().sum((0, 2, 3, 4))
                tail = torch.linalg.svdvals(centred(states, kind))[:, 5:].square().sum(1)
                assert torch.allclose(error, tail, rtol=FITTED)


def test_a_bias_does_not_make_the_error_larger(tmp_path) -> None:
    model = tiny("mixtral")
    path = made(model, tmp_path, Job(rank=5, length=24, steps=0), count=1 + 1)
    keys, values = (
        states[None, :, None]
        for states in cached_states(model, pieces_of(model, 2, Job(length=24))[0], 24)[1]
    )
    errors = []
    for kind in (LowRankAffine, LowRank):
        compressor = kind(calibration=path).bind(model.config, 1)
        decoded = compressor.decode(compressor.encode(keys, values))
        errors.append([(a - b).norm().item() for a, b in zip((keys, values), decoded, strict=True)])
    assert errors[0][0] < errors[1][0] and errors[0][1] < errors[1][1]


@KINDS
def test_training_that_does_not_help_changes_nothing(kind, tmp_path, monkeypatch) -> None:
    """Then the file is the untrained one."""
    model = tiny("mixtral")
    untrained = load_file(made(model, tmp_path, Job((kind.name,), length=24, steps=0)))
    monkeypatch.setattr("pikv_hf.fitting.projections.RATE", 100.0)
    trained = load_file(made(model, tmp_path, Job((kind.name,), length=24, steps=5)))
    assert trained.keys() == untrained.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in untrained.items())


@KINDS
def test_full_rank_loses_nothing(kind, tmp_path) -> None:
    model = tiny("mixtral")
    path = made(model, tmp_path, Job(rank=999, length=24, steps=3))
    compressor = kind(calibration=path).bind(model.config, 0)
    keys = torch.randn(1, 2, 3, 8, 16, dtype=torch.float64)
    for states in compressor.decode(compressor.encode(keys, keys)):
        assert (states - keys).abs().max() < SUMS


@KINDS
def test_decoded_pages_are_encoded_again_without_loss(kind, tmp_path) -> None:
    """After training too: in other pages, in another order."""
    model = tiny("mixtral")
    compressor = kind(calibration=made(model, tmp_path, Job(length=24, steps=30))).bind(
        model.config, 0
    )
    keys = torch.randn(1, 2, 3, 8, 16, dtype=torch.float64)
    once = compressor.decode(compressor.encode(keys, keys))
    mixed = [states.flatten(2, 3).flip(2).unflatten(2, (4, 6)) for states in once]
    again = compressor.decode(compressor.encode(*mixed))
    for first, second in zip(mixed, again, strict=True):
        assert (first - second).norm() < SUMS * first.norm()
    assert (once[0] - keys).norm() > 0.1 * keys.norm()
