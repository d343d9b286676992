"""The state of a calibration: what was captured, and what was fitted."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..compressors.lowrank import Factors
from ..compressors.moments import Moments
from ..model.artifact import CALIBRATION
from .calibration_job import Job
from .capture import Capture, Captured, Window
from .projections import Fit
from .resumable import Resumable


class Progress(Resumable):
    """The captures and fits of a calibration so far, by layer."""

    def __init__(self, model: PreTrainedModel, out: Path, job: Job, source: str) -> None:
        self.captured = Captured(0, {})
        self.has_read_all = False
        self.fits: dict[str, dict[int, Fit]] = {method: {} for method in job.methods}
        super().__init__(CALIBRATION, model, out, job, source)

    def factors(self) -> Factors:
        """Return all tensors fitted so far, by their names in a calibration file."""
        return {
            f"{method}.{idx}.{part}": tensor
            for method, fits in self.fits.items()
            for idx, found in fits.items()
            for part, tensor in found.factors.items()
        }

    def errors(self) -> dict[str, Any]:
        """Return the metadata that say how well the fits do."""
        errors = {
            m: {i: (f.before, f.after) for i, f in fits.items()} for m, fits in self.fits.items()
        }
        return {"held_out_errors": errors}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = self.factors(), {}
        for idx, capture in self.captured.layers.items():
            numbers[idx] = capture.scale, capture.keys.count
            tensors |= _named(f"capture.{idx}.", capture)
        state = [self.captured.pieces, self.has_read_all, numbers]
        return tensors, self.errors() | {"state": state}

    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        pieces, self.has_read_all, numbers = metadata["state"]
        layers = {int(idx): _capture_of(tensors, idx, *numbers[idx]) for idx in numbers}
        self.captured = Captured(pieces, layers)
        for method, errors in metadata["held_out_errors"].items():
            for idx, pair in errors.items():
                self.fits[method][int(idx)] = Fit(_under(tensors, f"{method}.{idx}."), *pair)


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
