"""The forward pass that runs in a thread: hooks leave here what concerns it."""

import threading

from torch import Tensor

from ..layer.handoff import SLOT
from .contract import AttachableCache


class _Running(threading.local):
    """One in each thread; a compiler guards on its attributes.

    `binding`: of the model that runs; `cache` and token `ids` of its forward pass; `generating`: the
    cache that the running `generate` was given.
    """

    def __init__(self) -> None:
        self.binding: object | None = None
        self.cache: AttachableCache | None = None
        self.ids: Tensor | None = None
        self.generating: AttachableCache | None = None

    @property
    def is_in_use(self) -> bool:
        """Whether anything here is of a cache: of `generate`, or left by a pass that failed."""
        return not (self.cache is None and SLOT.layer is None and self.generating is None)


RUNNING = _Running()
