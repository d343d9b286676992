"""Cache classes that some models define and require."""

import sys

from transformers import DynamicCache, PreTrainedModel


def model_cache_class(model: PreTrainedModel) -> type[DynamicCache] | None:
    """Return the cache class that the model's own modeling file defines, if any."""
    files = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    for name in sorted(files):
        for member in vars(sys.modules[name]).values():
            is_cache = isinstance(member, type) and issubclass(member, DynamicCache)
            if is_cache and member.__module__ == name:
                return member
    return None


def with_native(cls: type, native: type[DynamicCache] | None) -> type:
    """Return `cls`, or a subclass of `cls` and `native` if the model tests for `native`."""
    if native is None or issubclass(cls, native):
        return cls
    members = {"__module__": cls.__module__, "plain_class": cls, "native_class": native}
    return type(cls.__name__, (cls, native), members)
