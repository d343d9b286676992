"""Matrices of a model's projections, also of quantized, adapted and offloaded projections."""

from typing import Any

import torch
from torch import Tensor, nn

# Names of an attention module's output projection.
OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj", "linear_out")
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_plain(weight: Any) -> bool:
    """Return whether `weight` is a plain tensor: not quantized, sharded or offloaded.

    Tested by class, too: quantized weights of torchao have a floating dtype.
    """
    is_tensor = type(weight) in (Tensor, nn.Parameter)
    return is_tensor and weight.dtype in PLAIN and not weight.is_meta


def matrix(projection: Any, size: int, like: Tensor) -> Tensor:
    """Return the matrix [out, size] that `projection` applies to states [..., size].

    `like` has the dtype and device of the states. Without a plain weight the module is applied to
    unit vectors, which costs as much as projecting `size` tokens.
    """
    if type(projection) is nn.Linear and is_plain(projection.weight):
        return projection.weight
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    if getattr(projection, "bias", None) is None:
        return projection(unit).transpose(0, 1)
    both = projection(torch.cat([unit, torch.zeros_like(unit[:1])]))
    return (both[:-1] - both[-1:]).transpose(0, 1)


def output_projection(module: Any) -> Any:
    """Return the output projection of an attention module, to which `matrix` can be applied.

    Raises:
        ValueError: the module has no known output projection.
    """
    for name in OUTPUTS:
        if _is_applicable(found := getattr(module, name, None)):
            return found
    raise ValueError(
        f"`scheduler` reads the output projection of {type(module).__name__}, which has none of "
        f"{OUTPUTS} that is a linear module with its weight at hand, or other with `in_features`."
    )


def output_weight(module: Any, like: Tensor) -> Tensor:
    """Return the weight [hidden, Hq * Dv] of the output projection of an attention module."""
    projection = output_projection(module)
    return matrix(projection, projection.in_features, like).detach()


def _is_applicable(projection: Any) -> bool:
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear and type(weight) in (Tensor, nn.Parameter):
        return is_plain(weight) or hasattr(projection, "_hf_hook")  # accelerate loads the weight
    return isinstance(projection, nn.Module) and hasattr(projection, "in_features")
