"""Handover of a layer from its `update` to the attention function, which runs next."""

import threading
from typing import Any


class _Slot(threading.local):
    """A slot for a layer in each thread; a compiler guards on its attribute."""

    def __init__(self) -> None:
        self.layer: Any = None


SLOT = _Slot()


def hand_over(layer: Any) -> None:
    """Leave `layer`, whose `update` has run, for the attention function to take."""
    SLOT.layer = layer


def take_layer() -> Any:
    """Return the layer whose `update` ran last, and empty the slot; None if it is empty."""
    layer, SLOT.layer = SLOT.layer, None
    return layer
