"""transformers' QuantizedCache, which stands beside our compressors: what is installed, its bytes."""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, QuantizedCache, cache_utils

DISTRIBUTIONS = {"quanto": "optimum-quanto", "hqq": "hqq", "fp8": "transformers"}
# As transformers advises: so a group is of numbers that lie side by side, with a scale and a zero.
AXES = {"quanto": 0, "hqq": 1}
GROUP = 64


@dataclass(frozen=True)
class Peer:
    """A backend of QuantizedCache at one number of bits."""

    backend: str
    bits: int
    group: int = GROUP

    @property
    def name(self) -> str:
        if self.backend == "fp8":
            return "transformers fp8"
        size = "" if self.group == GROUP else f", groups of {self.group}"
        return f"{self.backend} int{self.bits}{size}"

    @property
    def version(self) -> str | None:
        """Of the package that does the work; None if it is not installed, or too old."""
        if self.backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
            return None
        try:
            return importlib.metadata.version(DISTRIBUTIONS[self.backend])
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.version or 'not installed'})"

    def cache(self, config: PreTrainedConfig, residual: int = 128) -> QuantizedCache:
        """An empty cache; fewer than `residual` tokens after the first write stay as they are."""
        if self.backend == "fp8":  # takes no options
            return QuantizedCache("fp8", config)
        axis = AXES[self.backend]
        return QuantizedCache(self.backend, config, self.bits, axis, axis, self.group, residual)


def quantized_bytes(layer: Any) -> int:
    """Bytes of codes, scales and zeros of a layer."""
    return sum(t.nbytes for t in innermost([layer._quantized_keys, layer._quantized_values]))


def innermost(value: Any) -> Iterator[Tensor]:
    """The plain tensors that make up `value`."""
    if hasattr(value, "__tensor_flatten__"):  # quanto's tensors are made of others
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from innermost(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from innermost(part)
