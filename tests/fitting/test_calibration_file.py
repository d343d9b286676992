"""For which model a calibration is taken, and what cannot be calibrated."""

import copy

import pytest
import torch
from calibrations import TINY, made, pieces_of
from helpers import SMALL, generate, tiny
from safetensors.torch import save_file
from transformers import PreTrainedModel
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.compressors import LowRank, LowRankAffine
from pikv_hf.fitting.calibrate import calibrate
from pikv_hf.fitting.calibration_job import METHODS, Job


def refused(model: PreTrainedModel, compressor, match: str) -> None:
    before = dict(vars(model))
    with pytest.raises(ValueError, match=match):
        PiKVCache(model, compressor=compressor)
    assert vars(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_uncalibrated(name) -> None:
    refused(tiny("mixtral"), name, f"{name} needs a calibration for the model: make one with")


def test_another_model(tmp_path) -> None:
    path = made(tiny("mixtral"), tmp_path)
    compressor = LowRank(calibration=path)
    was = r"`calibration` '.*cal.safetensors' was made for MixtralForCausalLM, not for "
    refused(tiny("olmoe"), compressor, was + "OlmoeForCausalLM: its model type is olmoe, not mixt")
    layers = build("mixtral", num_hidden_layers=3)
    refused(layers, compressor, was + ".*: its num_hidden_layers is 3, not 4")
    refused(build("mixtral", seed=1), compressor, was + ".*: its weight .* has other numbers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_model_in_another_dtype(dtype, tmp_path) -> None:
    path = made(tiny("mixtral"), tmp_path)
    model = copy.deepcopy(tiny("mixtral")).to(dtype)
    with PiKVCache(model, compressor=LowRank(calibration=path), **SMALL) as cache:
        if dtype != torch.float64:  # grouped experts have none
            generate(model, prompt(model, (30,)), cache)


def test_files_that_are_no_calibration(tmp_path) -> None:
    model = tiny("mixtral")
    refused(model, LowRank(calibration="/no/file"), "`calibration` is '/no/file'; there is no such")
    (tmp_path / "text").write_text("not a file of numbers")
    refused(
        model, LowRank(calibration=tmp_path / "text"), "`calibration` '.*text' cannot be read: "
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    refused(model, LowRank(calibration=tmp_path / "other"), "'.*other' is no file that `pikv calib")
    path = made(model, tmp_path, Job(methods=("lowrank",), length=24, steps=0))
    refused(
        model,
        LowRankAffine(calibration=path),
        "was made for lowrank, not for lowrank_affine: run `pikv calibrate --method lowrank_affine`",
    )
    with pytest.raises(TypeError, match="`calibration` is 3; it must be the path of a file"):
        LowRank(calibration=3)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"methods": ("int8",)}, r"`methods` are \['int8'\]; they must be among"),
        ({"methods": ()}, "at least one"),
        ({"rank": 0}, "`rank` is 0; it must be a positive whole number"),
        ({"length": 1.5}, "`length` is 1.5"),
        ({"windows": -1}, "`windows` is -1"),
        ({"steps": -1}, "`steps` is -1; it must be a whole number, 0 or more"),
    ],
)
def test_wrong_jobs(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        Job(**options)


def test_what_cannot_be_calibrated(tmp_path) -> None:
    model, path = tiny("mixtral"), tmp_path / "cal.safetensors"
    with pytest.raises(
        ValueError, match="fewer than 210 tokens, two pieces of 105: give more text"
    ):
        calibrate(model, pieces_of(model, 1), path, TINY)
    with pytest.raises(ValueError, match="`length` is 500, and 65 more tokens .* at most 512"):
        calibrate(model, pieces_of(model, 1), path, Job(length=500))
    broken = build("mixtral")
    broken.model.layers[2].self_attn.k_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="layer 2: .*keys.* NaN"):
        calibrate(broken, pieces_of(model, 3), path, TINY)
    assert not [*tmp_path.iterdir()], "an attempt that cannot succeed leaves nothing"
