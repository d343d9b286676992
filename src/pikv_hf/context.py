"""What the running forward pass of each thread is about: the hooks and `update` leave it here."""

import threading
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .attach import Binding
    from .attached import AttachedCache
    from .layer import PagedLayer


class _Context(threading.local):
    binding: "Binding | None" = None
    cache: "AttachedCache | None" = None
    ids: Tensor | None = None
    layer: "PagedLayer | None" = None
    generating: "AttachedCache | None" = None


#: `binding` of the model that runs; `cache` and token `ids` of its forward pass; `layer` whose `update` ran last, until its attention
#: function, which the model calls next, takes it; `generating`, the cache that the running `generate` was given.
CONTEXT = _Context()


def take_layer() -> "PagedLayer | None":
    layer, CONTEXT.layer = CONTEXT.layer, None
    return layer
