"""Names in transformers that change between versions, and its internals that pikv_hf uses.

`tests/model/test_transformers_names.py` lists each internal with the reason for it.
"""

import copy
import dataclasses
import functools
import inspect
import warnings
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..requirements import NEWEST_TRANSFORMERS, TESTED, VERSION, minor

# Names of transformers that other files import from here, and from nowhere else.
__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "BaseStreamer",
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "logging",
]

# Names of the cache among arguments and outputs of models and `generate`, the newest first.
CACHE_NAMES = ("cache", "past_key_values")


def unsupported() -> str:
    """Return a message: the installed transformers is not supported by pikv_hf."""
    return (
        f"transformers {transformers.__version__} is not supported by pikv_hf {VERSION} ({TESTED})"
    )


def is_tested() -> bool:
    """Return whether the whole test suite has passed on the installed transformers."""
    return minor(transformers.__version__) <= NEWEST_TRANSFORMERS


@functools.cache
def warn_if_untested() -> None:
    """Warn once if transformers is newer than all tested versions."""
    if not is_tested():
        warnings.warn(f"{unsupported()}: it may not work.", UserWarning, stacklevel=4)


def current_cache_name(fields: set[str]) -> str:
    """Return the name of the cache among `fields` of a model's output, or raise ImportError."""
    for name in CACHE_NAMES:
        if name in fields:
            return name
    raise ImportError(f"{unsupported()}: none of the arguments {CACHE_NAMES} is known to it.")


#: "cache" since transformers 5.24, "past_key_values" before.
CACHE = current_cache_name({f.name for f in dataclasses.fields(BaseModelOutputWithPast)})


#: The method of a model that `generate` calls to read the prompt.
PREFILL = "_prefill"


def with_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """Return `cache` as a keyword argument of a model or of `generate`."""
    return {CACHE: cache}


def cache_in(output: Any) -> Any:
    """Return the cache in the output of a model or of `generate`."""
    return getattr(output, CACHE)


def given_cache(inputs: dict[str, Any]) -> Any:
    """Return the cache that a model, or `generate`, reads from its arguments `inputs`.

    The newest name wins if both are given.
    """
    read = CACHE_NAMES[CACHE_NAMES.index(CACHE) :]
    return next((inputs[name] for name in read if name in inputs), None)


def unread_argument(name: str) -> str:
    """Return a message: a cache was passed as the argument `name`, which nothing reads."""
    if is_tested():
        return (
            f"`{name}` is a PiKVCache, but the argument that transformers {transformers.__version__} "
            f"reads is `{CACHE}`: pass it as `{CACHE}`."
        )
    return f"{unsupported()}: it passes the cache as `{name}`."


def forward_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a forward pass of `module` by name, positional ones included."""
    if not args:
        return kwargs
    return dict(zip(_parameters(type(module)), args, strict=False)) | kwargs


@functools.cache
def _parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return the name of the attention function that a module with `config` calls."""
    return config._attn_implementation


def with_attention_implementation(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return a copy of `config` whose module calls the attention function `name`."""
    changed = copy.copy(config)
    changed._attn_implementation_internal = name
    return changed


def full_attention_mask(mask: Any) -> Tensor | None:
    """Return the mask of full-attention layers from `mask`, which may be a dict by layer type."""
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def has_readable_masks(implementation: str) -> bool:
    """Return whether pikv_hf can read the masks made for an attention function."""
    readable = (eager_mask, sdpa_mask, flash_attention_mask)
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) in readable


def declared_gates(model_class: type) -> list[Any]:
    """Return the classes or recorders that a model class declares for `output_router_logits`."""
    entry = (getattr(model_class, "_can_record_outputs", None) or {}).get("router_logits")
    return entry if isinstance(entry, list) else [] if entry is None else [entry]
