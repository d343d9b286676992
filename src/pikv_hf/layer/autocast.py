"""A decorator that keeps `torch.autocast` away from the arithmetic of the cache."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

from .state import LayerState

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[Concatenate[LayerState, P], R]


def without_autocast(step: Step[P, R]) -> Step[P, R]:
    """Run `step` of a paged layer with autocast off on the device of the layer.

    Autocast would change the dtypes of products: scales, scores and eigenvectors would be rounded,
    or meet tensors of another dtype. Arguments from the model must have the tail's dtype.
    """

    @functools.wraps(step)
    def run(state: LayerState, *args: P.args, **kwargs: P.kwargs) -> R:
        kind = state.tail.keys.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return step(state, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return step(state, *args, **kwargs)

    return run
