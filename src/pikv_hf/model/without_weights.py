"""Models on the meta device, without weights, whose forward pass computes shapes only."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    PreTrainedModel,
)

from .versions import with_cache


def from_config(name: str, dtype: str = "auto") -> PreTrainedModel:
    """Make the model `name` (a Hub name, a folder or a config file) without weights.

    `dtype` "auto" is the dtype that the config names, or bfloat16 if it names none.

    Raises:
        OSError, ValueError: there is no config, or none of a model that generates text.
    """
    config = AutoConfig.from_pretrained(name)
    named = config.get_text_config(decoder=True).dtype or config.dtype or torch.bfloat16
    chosen = named if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=chosen).eval()
        except ValueError:  # a model that reads images, too
            return AutoModelForImageTextToText.from_config(config, dtype=chosen).eval()


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the class, config and dtype of `model`, on the meta device."""
    with torch.device("meta"):
        copied = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
    copied.set_attn_implementation("eager")
    with contextlib.suppress(ValueError):  # without it an expert is run for each token
        copied.set_experts_implementation("batched_mm")
    return copied


def trace(model: PreTrainedModel, cache: Cache, batch: int, tokens: int) -> None:
    """Run a forward pass of `model`, on the meta device, that writes to `cache`.

    Raises:
        ValueError: the forward pass needs the values of tensors, not only their shapes.
    """
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    run: Callable[..., Any] = model
    try:
        with torch.no_grad(), _AnyValues():
            run(input_ids=ids, **inputs, **with_cache(cache))
    except (AttributeError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"`model` is a {type(model).__name__}, whose forward pass does not run without weights, so "
            f"that the shapes of its cache are not known: {str(error).splitlines()[0]}"
        ) from error


class _AnyValues(TorchDispatchMode):
    """Answers 1 where a model reads a number of a meta tensor, and that no number is zero."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten, source = torch.ops.aten, args[0] if args else None
        if isinstance(source, Tensor) and source.is_meta:
            if func is aten._local_scalar_dense.default:
                return torch.ones((), dtype=source.dtype).item()
            if func is aten.nonzero.default:
                return source.new_empty(source.numel(), source.dim(), dtype=torch.int64)
        return func(*args, **(kwargs or {}))
