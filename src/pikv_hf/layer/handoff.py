"""Handover of a layer from its `update` to the attention function that the model calls next."""

import threading
from typing import Any


class _Slot(threading.local):
    """A slot for a layer in each thread; a compiler guards on its attribute."""

    def __init__(self) -> None:
        self.layer: Any = None


SLOT = _Slot()


def hand_over(layer: Any) -> None:
    """Leave the layer whose `update` has run, for the attention function."""
    SLOT.layer = layer


def take_layer() -> Any:
    """Take out the layer whose `update` ran last, if its attention did not run yet; else None."""
    layer, SLOT.layer = SLOT.layer, None
    return layer
