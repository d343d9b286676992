"""Refusal of keys and values that are NaN or infinite, which few compressors can encode."""

import torch
from torch import Tensor

from .codec import PageCodec


def are_finite(keys: Tensor, values: Tensor) -> Tensor:
    """Return [2] bool on the device of `keys`: whether all keys, and all values, are finite."""
    ends = [  # `aminmax` would copy tensors that are not dense, such as a view of a tail
        torch.stack([states.amin(), states.amax()]) if states.numel() else states.new_zeros(2)
        for states in (keys, values)
    ]
    return torch.stack(ends).isfinite().all(1)


def refuse_if_not(finite: list[bool], codec: PageCodec) -> None:
    """Raise ValueError unless the keys, and the values, that `codec` stores are `finite`."""
    for name, is_finite in zip(("key", "value"), finite, strict=True):
        if not is_finite:
            raise ValueError(not_finite(codec, name))


def not_finite(codec: PageCodec, name: str) -> str:
    """Return the message that refuses keys or values (`name`) for `codec`."""
    return (
        f"{codec.title} cannot store {name}s that are NaN or infinite: look for the module "
        "that made them, or for a dtype that overflows (float16), with compressor='identity'."
    )
