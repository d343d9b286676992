"""From `update` to the attention function that the model calls next: which layer it is about."""

import threading
from typing import Any


class _Slot(threading.local):
    """One slot in each thread; a compiler guards on its attribute."""

    def __init__(self) -> None:
        self.layer: Any = None


SLOT = _Slot()


def hand_over(layer: Any) -> None:
    """Leave the layer whose `update` has run, for the attention function."""
    SLOT.layer = layer


def take_layer() -> Any:
    """The layer whose `update` ran last and whose attention did not, or None; it is taken away."""
    layer, SLOT.layer = SLOT.layer, None
    return layer
