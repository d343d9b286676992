"""Arithmetic on what is cached, which has dtypes of its own: `torch.autocast` is for the model's."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from .layer import PagedLayer

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[Concatenate["PagedLayer", P], R]


def without_autocast(step: Step[P, R]) -> Step[P, R]:
    """Run `step` of a paged layer with autocast off on the device of the layer.

    Under autocast products lose the dtype that was chosen for them: scales, scores and eigenvectors
    would be rounded, or meet tensors of another dtype. What `step` is given of the model has to be
    in the dtype of the tail.
    """

    @functools.wraps(step)
    def run(layer: "PagedLayer", *args: P.args, **kwargs: P.kwargs) -> R:
        kind = layer.tail.keys.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return step(layer, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return step(layer, *args, **kwargs)

    return run
