"""The devices on which a model runs its attention layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def layer_devices(
    attention: dict[int, list[nn.Module]], model: nn.Module
) -> dict[int, torch.device]:
    """Return the device on which each layer of `attention` runs, and so makes keys and values.

    It is the execution device of a hook of accelerate: of the attention module, of a part of it
    (`cpu_offload`), or of the module of `model` around it that is nearest. Without a hook it is the
    device of the first weight. `hf_device_map` is not read: it names the place of the weights, and
    an offloaded layer runs elsewhere.

    Raises:
        ValueError: a layer has neither a hook nor a weight that is loaded.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for layer, modules in attention.items():
        around = _around(model, names[modules[0]])
        hooks = (_execution_device(module) for module in (*modules[0].modules(), *around))
        weights = (weight.device for weight in modules[0].parameters() if not weight.is_meta)
        given = next((device for device in hooks if device is not None), None)
        device = next(weights, None) if given is None else torch.device(given)
        if device is None:
            raise ValueError(
                f"`model` is a {type(model).__name__} whose layer {layer} has no weights: load them "
                "first."
            )
        found[layer] = device
    return found


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules of `model` that contain the module `name`, the smallest first."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:end]))


def _execution_device(module: nn.Module) -> Any:
    """Return where the hook of accelerate runs `module`; None = it has none that says so."""
    todo = [getattr(module, "_hf_hook", None)]
    while todo:
        hook = todo.pop(0)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return device
        todo += getattr(hook, "hooks", ())
    return None
