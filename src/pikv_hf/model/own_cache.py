"""Cache classes of their own that some models insist on."""

import sys

from transformers import DynamicCache, PreTrainedModel


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
