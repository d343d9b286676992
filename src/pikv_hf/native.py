"""Transformers' own cache classes and layers, where PiKVCache stands beside them."""

import sys
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .layer import PagedLayer


def reads_full_mask(layer: Any) -> bool:
    """Whether a layer that is not paged shares the mask of the paged ones."""
    return (
        isinstance(layer, CacheLayerMixin)
        and not isinstance(layer, PagedLayer)
        and not getattr(layer, "is_sliding", False)
    )


def release_prompt(layer: Any) -> None:
    """A sliding layer keeps its window as a view of the whole prompt: keep the window alone.

    Not of one new token, which every decode step leaves behind the view.
    """
    if not getattr(layer, "is_sliding", False) or getattr(layer, "record_past", False):
        return
    for name in ("keys", "values"):
        states = getattr(layer, name)
        if states.untyped_storage().nbytes() > 2 * states.numel() * states.element_size():
            setattr(layer, name, states.clone())


def model_cache_class(model: PreTrainedModel) -> type[DynamicCache] | None:
    """The cache class that the model's own modeling file defines and insists on, if any."""
    files = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    for name in sorted(files):
        for member in vars(sys.modules[name]).values():
            is_cache = isinstance(member, type) and issubclass(member, DynamicCache)
            if is_cache and member.__module__ == name:
                return member
    return None


def with_native(cls: type, native: type[DynamicCache] | None) -> type:
    """`cls`, or a subclass of it that is also a `native`, which the model tests for."""
    if native is None or issubclass(cls, native):
        return cls
    members = {"__module__": cls.__module__, "plain_class": cls, "native_class": native}
    return type(cls.__name__, (cls, native), members)
