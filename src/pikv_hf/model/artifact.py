"""Calibration files: tensors that were fitted to one model, and the identity of that model.

A file is in the safetensors format. Its tensors are called `method.layer.part`, for instance
`lowrank.3.key_up`. Its metadata is one JSON text, which begins with the model: safetensors writes
several metadata entries in any order, and equal calibrations must give equal files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .output_projection import is_plain

METADATA = "pikv_calibration"
GEOMETRY = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
)
SAMPLES = 32  # numbers of each weight in the fingerprint
SAMPLED_LAYERS = 3
# Rounding to bfloat16 moves a fingerprint by .0011 of its norm; other weights differ by about 1.4.
SAME_WEIGHTS = 0.005


@dataclass(frozen=True)
class FileKind:
    """A kind of file made for one model: the argument that takes it, its key, its command."""

    argument: str
    key: str
    command: str


CALIBRATION = FileKind("calibration", METADATA, "pikv calibrate")


@dataclass(frozen=True)
class ModelIdentity:
    """The identity of a model, as it is written into the metadata of a calibration.

    `fingerprint`: a few numbers of attention weights, by parameter. It does not depend on dtype or
    device, and does not read the whole model.
    """

    name: str
    model_type: str
    geometry: dict[str, int]
    fingerprint: dict[str, list[float]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelIdentity":
        config = model.config.get_text_config(decoder=True)
        found = {name: getattr(config, name, None) for name in GEOMETRY}
        geometry = {name: value for name, value in found.items() if isinstance(value, int)}
        return cls(_name_of(model), config.model_type, geometry, dict(_samples(model)))

    def difference(self, other: "ModelIdentity") -> str | None:
        """Return how the model `other` differs from this model; None = no visible difference."""
        if other.model_type != self.model_type:
            return f"its model type is {other.model_type}, not {self.model_type}"
        for name, value in self.geometry.items():
            if other.geometry.get(name) != value:
                return f"its {name} is {other.geometry.get(name)}, not {value}"
        for name, numbers in self.fingerprint.items():
            if name in other.fingerprint:
                a, b = (torch.tensor(n) for n in (numbers, other.fingerprint[name]))
                if a.shape != b.shape or not _is_close(a, b):
                    return f"its weight {name} has other numbers"
        return None


def read_metadata(path: str | PathLike[str], kind: FileKind = CALIBRATION) -> dict[str, Any]:
    """Return the metadata of a calibration file, or of a file of another kind.

    Raises:
        ValueError: there is no such file, or the command of `kind` did not make it.
    """
    name = f"`{kind.argument}`"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{name} is {str(path)!r}; there is no such file.") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} {str(path)!r} cannot be read: {error}.") from error
    if kind.key not in metadata:
        raise ValueError(f"{name} {str(path)!r} is no file that `{kind.command}` made.")
    return json.loads(metadata[kind.key])


def read_factors(path: str | PathLike[str], prefix: str) -> dict[str, Tensor]:
    """Read only tensors whose names begin with `prefix`; return them by the rest of the name."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def check_model(
    path: str | PathLike[str], model: PreTrainedModel, kind: FileKind = CALIBRATION
) -> None:
    """Raise ValueError unless the file at `path` was made for `model`."""
    made_for = ModelIdentity(**read_metadata(path, kind)["model"])
    difference = made_for.difference(ModelIdentity.of(model))
    if difference is not None:
        raise ValueError(
            f"`{kind.argument}` {str(path)!r} was made for {made_for.name}, not for {_name_of(model)}: "
            f"{difference}."
        )


def check_method(path: str | PathLike[str], model: PreTrainedModel, method: str) -> None:
    """Raise ValueError unless the calibration at `path` was made for `model` and for `method`."""
    check_model(path, model)
    methods = read_metadata(path)["job"]["methods"]
    if method not in methods:
        raise ValueError(
            f"`calibration` {str(path)!r} was made for {', '.join(methods)}, not for {method}: run "
            f"`pikv calibrate --method {method}`."
        )


def _name_of(model: PreTrainedModel) -> str:
    return model.config.name_or_path or type(model).__name__


def _samples(model: PreTrainedModel) -> Iterator[tuple[str, list[float]]]:
    """Yield numbers of the first, middle and last layer whose attention weights can be read."""
    layers = []
    for name, module in model.named_modules():
        if (
            "attn" in name.rpartition(".")[2].lower()
            or "attention" in type(module).__name__.lower()
        ):
            plain = [(n, w) for n, w in module.named_parameters(prefix=name) if is_plain(w)]
            if plain:
                layers.append(plain)
    last = len(layers) - 1
    places = {last * i // (SAMPLED_LAYERS - 1) for i in range(SAMPLED_LAYERS)} if layers else ()
    for idx in sorted(places):
        for name, weight in layers[idx]:
            step = max(weight.numel() // SAMPLES, 1)
            yield name, weight.detach().flatten()[::step][:SAMPLES].float().tolist()


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= SAME_WEIGHTS * a.norm().maximum(b.norm()))
