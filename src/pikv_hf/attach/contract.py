"""What attaching asks of a cache."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor


class AttachableCache(ABC):
    """A cache that a `Binding` tells of the forward passes of its model.

    Once for each forward pass that is given the cache come `check_inputs`, `begin_forward`, `label`
    for each layer whose gate is heard, and `end_forward`. After a forward pass that raised, only the
    next `check_inputs` follows.
    """

    #: The binding to the model; None while detached.
    binding: Any = None

    @abstractmethod
    def check_generate(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError if a call of `generate` would ignore or misread the cache."""

    @abstractmethod
    def generating(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Within the block `generate`, or its reading of the prompt, runs with these arguments."""

    @abstractmethod
    def check_inputs(self, model: Any, inputs: dict[str, Any], length: int) -> None:
        """Raise if the inputs of a forward pass do not continue what the cache holds.

        `inputs` by name, of the decoder of `model`; `length`: their tokens. Changes nothing.
        """

    @abstractmethod
    def begin_forward(self, inputs: dict[str, Any], length: int) -> None:
        """A forward pass over `length` new tokens starts."""

    @abstractmethod
    def awaits_experts(self, layer_idx: int) -> bool:
        """Whether the newest tokens of a layer still lack their labels."""

    @abstractmethod
    def label(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        """The gate of `layer_idx` chose `experts` [B * q, k] with `weights` for the newest tokens."""

    @abstractmethod
    def end_forward(self, ids: Tensor | None) -> None:
        """The forward pass of the token `ids` is over.

        Raises:
            RuntimeError: a layer never saw its attention or its gate.
        """

    @abstractmethod
    def skip_forward(self) -> None:
        """A forward pass of `generate` goes without this cache, which was passed to it."""
