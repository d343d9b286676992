"""The forward pass that runs in each thread, as hooks of the model have noted it."""

import threading

from torch import Tensor

from ..layer.handoff import SLOT
from .contract import AttachableCache


class _Running(threading.local):
    """The running forward pass of a thread; torch.compile guards on its attributes.

    `binding`: binding of the running model; `cache`, `ids`: cache and token ids of the forward
    pass; `generating`: cache that was passed to the running `generate`.
    """

    def __init__(self) -> None:
        self.binding: object | None = None
        self.cache: AttachableCache | None = None
        self.ids: Tensor | None = None
        self.generating: AttachableCache | None = None

    @property
    def is_in_use(self) -> bool:
        """True if `generate` or a forward pass uses a cache, or a failed forward pass left one."""
        return not (self.cache is None and SLOT.layer is None and self.generating is None)


RUNNING = _Running()
