"""The state of a calibration, in memory and in the file that an interrupted one leaves."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..compressors.lowrank import Factors
from ..compressors.moments import Moments
from ..model.artifact import METADATA, ModelIdentity, read_metadata
from .calibration_job import Job
from .capture import Capture, Captured, Window
from .projections import Fit

SAVE_EVERY_S = 300.0


class Progress:
    """The state of a calibration, loaded from the file of an interrupted one if there is any."""

    def __init__(self, model: PreTrainedModel, out: Path, job: Job, source: str) -> None:
        self.path = out.with_name(out.name + ".partial")
        self.model = ModelIdentity.of(model)
        self.job, self.source = job, source
        self.captured = Captured(0, {})
        self.has_read_all = False
        self.fits: dict[str, dict[int, Fit]] = {method: {} for method in job.methods}
        self._saved_at = time.monotonic()
        if self.path.exists():
            self._load()

    def factors(self) -> Factors:
        """Return all tensors fitted so far, by their names in a calibration file."""
        return {
            f"{method}.{idx}.{part}": tensor
            for method, fits in self.fits.items()
            for idx, found in fits.items()
            for part, tensor in found.factors.items()
        }

    def metadata(self) -> dict[str, Any]:
        errors = {
            m: {i: (f.before, f.after) for i, f in fits.items()} for m, fits in self.fits.items()
        }
        return {
            "model": asdict(self.model),
            "job": asdict(self.job),
            "source": self.source,
            "held_out_errors": errors,
        }

    def save_sometimes(self) -> None:
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        tensors, numbers = self.factors(), {}
        for idx, capture in self.captured.layers.items():
            numbers[idx] = capture.scale, capture.keys.count
            tensors |= _named(f"capture.{idx}.", capture)
        state = [self.captured.pieces, self.has_read_all, numbers]
        write(self.path, tensors, self.metadata() | {"state": state})
        self._saved_at = time.monotonic()

    def _load(self) -> None:
        metadata, expected = read_metadata(self.path), json.loads(json.dumps(self.metadata()))
        if any(metadata[name] != expected[name] for name in ("model", "job", "source")):
            raise ValueError(
                f"`{self.path}` was left by a calibration of another model, other texts or other "
                "options: delete it, or write to another file."
            )
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        pieces, self.has_read_all, numbers = metadata["state"]
        layers = {int(idx): _capture_of(tensors, idx, *numbers[idx]) for idx in numbers}
        self.captured = Captured(pieces, layers)
        for method, errors in metadata["held_out_errors"].items():
            for idx, pair in errors.items():
                found = _under(tensors, f"{method}.{idx}.")
                self.fits[method][int(idx)] = Fit(found, *pair)


def _named(prefix: str, capture: Capture) -> dict[str, Tensor]:
    tensors = {}
    for name in ("keys", "values"):
        moments = getattr(capture, name)
        tensors |= {
            f"{prefix}{name}.{part}": getattr(moments, part) for part in ("first", "second")
        }
    for name in ("fitted", "held_out"):
        for number, window in enumerate(getattr(capture, name)):
            parts = window._asdict().items()
            tensors |= {f"{prefix}{name}.{number}.{part}": tensor for part, tensor in parts}
    return tensors


def _capture_of(tensors: dict[str, Tensor], idx: str, scale: float, count: int) -> Capture:
    """Rebuild the capture of layer `idx` from the tensors of a saved file."""
    own = _under(tensors, f"capture.{idx}.")
    keys, values = (
        Moments(count, own[f"{name}.first"], own[f"{name}.second"]) for name in ("keys", "values")
    )
    windows: dict[str, list[Window]] = {"fitted": [], "held_out": []}
    for name, held in windows.items():
        while found := _under(own, f"{name}.{len(held)}."):
            held.append(Window(**found))
    return Capture(scale, keys, values, tuple(windows["fitted"]), tuple(windows["held_out"]))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def write(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], key: str = METADATA
) -> None:
    """Write a safetensors file to `path` atomically, with `metadata` as JSON under `key`."""
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, {key: json.dumps(metadata)})
    os.replace(unfinished, path)
