"""The forward pass that runs in each thread, as hooks of the model have noted it."""

import threading

from torch import Tensor

from ..layer.handoff import SLOT
from .contract import AttachableCache


class _Running(threading.local):
    """The running forward pass of a thread; torch.compile guards on its attributes.

    `binding`: binding of the running model; `cache`, `ids`: cache and token ids of the forward
    pass; `generating`: the cache that the running `generate` was given.
    """

    def __init__(self) -> None:
        self.binding: object | None = None
        self.cache: AttachableCache | None = None
        self.ids: Tensor | None = None
        self.generating: AttachableCache | None = None

    @property
    def is_in_use(self) -> bool:
        """True if a cache is used, by `generate` or a pass, or was left by a pass that failed."""
        return not (self.cache is None and SLOT.layer is None and self.generating is None)


RUNNING = _Running()
