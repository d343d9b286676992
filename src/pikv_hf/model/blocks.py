"""The parts of a model that stay whole when it is spread over devices."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Block:
    """Modules or parameters of one device: names, bytes of weights, indices of cache layers.

    There are several names if weights are tied.
    """

    names: tuple[str, ...]
    nbytes: int
    layers: tuple[int, ...]


def blocks(model: PreTrainedModel, no_split: Collection[str] | None = None) -> list[Block]:
    """Return the blocks of `model` in the order of its modules, which covers all its weights.

    A module is split while it holds the cache layers of several attention modules, or a module of
    a class in `no_split` (None = the classes that the model names), and never if it is of such a
    class itself. Weights that are tied belong to the first block that has them.
    """
    classes = {*(getattr(model, "_no_split_modules", None) or () if no_split is None else no_split)}
    of_decoder = {id(module) for module in model.get_decoder().modules()}
    found: list[Block] = []
    owner: dict[int, int] = {}
    for name, part in _split("", model, classes, of_decoder):
        tensors = [part] if isinstance(part, Tensor) else [*part.parameters(), *part.buffers()]
        layers = () if isinstance(part, Tensor) else tuple(sorted(_layers(part, of_decoder)))
        new = [tensor for tensor in tensors if id(tensor) not in owner]
        tied = min((owner[id(t)] for t in tensors if id(t) in owner), default=None)
        block = Block((name,), sum(tensor.nbytes for tensor in new), layers)
        if tied is None:
            tied = len(found)
            found.append(block)
        else:
            first = found[tied]
            names, layers = (*first.names, name), (*first.layers, *layers)
            found[tied] = Block(names, first.nbytes + block.nbytes, layers)
        owner.update((id(tensor), tied) for tensor in new)
    return found


def _split(
    name: str, module: nn.Module, classes: set[str], of_decoder: set[int]
) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Yield the parts of `module`, called `name`, that stay whole."""
    inside = itertools.islice(module.modules(), 1, None)
    has_whole = any(type(part).__name__ in classes for part in inside)
    if type(module).__name__ in classes or not (has_whole or len(_layers(module, of_decoder)) > 1):
        yield name, module
        return
    prefix = f"{name}." if name else ""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    yield from ((prefix + key, tensor) for key, tensor in own)
    for key, child in module.named_children():
        yield from _split(prefix + key, child, classes, of_decoder)


def _layers(module: nn.Module, of_decoder: set[int]) -> set[int]:
    """Return the indices of the cache layers that modules inside of `module` write to.

    A decoder layer with several attention modules may be numbered, too: the innermost count.
    """
    numbered: list[Any] = [
        part
        for part in module.modules()
        if id(part) in of_decoder and isinstance(getattr(part, "layer_idx", None), int)
    ]
    outer = {id(a) for a in numbered for b in a.modules() if b is not a and b in set(numbered)}
    return {part.layer_idx for part in numbered if id(part) not in outer}
