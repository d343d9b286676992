"""The transformers model inside of wrappers."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


def unwrap(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a DDP or PEFT wrapper or a `torch.compile`d module."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    inner = getattr(inner, "_orig_mod", inner)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}; it must be a transformers PreTrainedModel, or one "
            "wrapped by PEFT, torch.compile or DistributedDataParallel."
        )
    return inner
