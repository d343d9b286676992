"""What the running forward pass of each thread is about: the hooks and `update` leave it here."""

import threading
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .attach import Binding
    from .attached import AttachedCache
    from .layer import PagedLayer


class _Context(threading.local):
    def __init__(self) -> None:  # in each thread: a compiler guards on attributes of the object
        self.binding: Binding | None = None
        self.cache: AttachedCache | None = None
        self.ids: Tensor | None = None
        self.layer: PagedLayer | None = None
        self.generating: AttachedCache | None = None

    @property
    def is_in_use(self) -> bool:
        """Whether anything here is of a cache: of `generate`, or left by a pass that failed."""
        return not (self.cache is None and self.layer is None and self.generating is None)


#: `binding` of the model that runs; `cache` and token `ids` of its forward pass; `layer` whose `update` ran last, until its attention
#: function, which the model calls next, takes it; `generating`, the cache that the running `generate` was given.
CONTEXT = _Context()


def take_layer() -> "PagedLayer | None":
    layer, CONTEXT.layer = CONTEXT.layer, None
    return layer
