"""What the running forward pass of each thread is about: the hooks and `update` leave it here."""

import threading
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .attached import AttachedCache
    from .layer import PagedLayer


class _Context(threading.local):
    cache: "AttachedCache | None" = None
    ids: Tensor | None = None
    layer: "PagedLayer | None" = None


#: `cache` and token `ids` of the forward pass; `layer` whose `update` ran last, until its attention
#: function, which the model calls next, takes it.
CONTEXT = _Context()


def take_layer() -> "PagedLayer | None":
    layer, CONTEXT.layer = CONTEXT.layer, None
    return layer
