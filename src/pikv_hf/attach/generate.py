"""`generate` of a model that caches are attached to."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from transformers import EncoderDecoderCache, PreTrainedModel

from ..model.versions import PREFILL, given_cache, unread_argument
from .contract import AttachableCache
from .forward import RUNNING


class CheckedGenerate:
    """`model.generate` that first refuses calls which would silently ignore or misread the cache.

    Then calls the `generate` that somebody has set on the model object, or else its class's method.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        self.own = vars(model).get("generate")
        self.__wrapped__ = self.own or type(model).generate
        self.__doc__ = self.__wrapped__.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model()
        cache = attachable_cache(kwargs)
        if cache is not None:
            cache.check_generate(model, args, kwargs)
        outer, RUNNING.generating = RUNNING.generating, cache
        try:
            if self.own is not None:
                return self.own(*args, **kwargs)
            if cache is None:
                return type(model).generate(model, *args, **kwargs)
            with cache.generating(model, args, kwargs):
                return type(model).generate(model, *args, **kwargs)
        finally:
            RUNNING.generating = outer


def checked_prefill(model: PreTrainedModel) -> Callable[..., Any]:
    """Return a prefill of `generate` for `model` that tells the cache the length of the prompt.

    In `model.generate(cache=PiKVCache(model))`, Python looks `generate` up before attaching sets
    `CheckedGenerate`, so only the prefill can be checked.
    """
    found, own = weakref.ref(model), vars(model).get(PREFILL)

    def prefill(
        input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        model: Any = found()
        call = own or functools.partial(getattr(type(model), PREFILL), model)
        cache = attachable_cache(model_kwargs)
        if cache is None or cache is RUNNING.generating:  # it knows its prompt
            return call(input_ids, generation_config, model_kwargs, *args, **kw)
        with cache.generating(model, (input_ids,), model_kwargs):
            return call(input_ids, generation_config, model_kwargs, *args, **kw)

    return prefill


def attachable_cache(inputs: dict[str, Any]) -> AttachableCache | None:
    """Return the attachable cache in `inputs`, the arguments of a model or of `generate`.

    Raises:
        ValueError: such a cache is in an argument that the model does not read.
    """
    cache = given_cache(inputs)
    for name, value in inputs.items():
        if value is not cache and as_attachable(value) is not None:
            raise ValueError(unread_argument(name))
    return as_attachable(cache)


def as_attachable(cache: Any) -> AttachableCache | None:
    """Return `cache`, or the part of it that a decoder writes to, if it is attachable."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, AttachableCache) else None
