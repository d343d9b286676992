"""The interface through which a `Binding` talks to a cache."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig


class AttachableCache(ABC):
    """A cache that a `Binding` notifies of the forward passes of its model.

    Each forward pass with the cache calls `check_inputs`, `begin_forward`, `foretell` before each
    layer that asks for it, `label` for each layer whose gate ran, and `end_forward`. After a pass that raised, `check_inputs` is next.
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
        """Return a context in which `generate`, or its prefill, runs with these arguments."""

    @abstractmethod
    def check_inputs(self, model: Any, config: PreTrainedConfig, inputs: dict[str, Any]) -> None:
        """Raise if the inputs of a forward pass do not continue the text in the cache.

        `inputs`: arguments by name of the decoder of `model`, which has `config`. Changes nothing.
        """

    @abstractmethod
    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """Begin a forward pass over `inputs`."""

    @abstractmethod
    def awaits_experts(self, layer_idx: int) -> bool:
        """Return whether the newest tokens of a layer still lack their experts."""

    @abstractmethod
    def label(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        """Label the newest tokens of a layer with its gate's `experts` [B * q, k] and `weights`."""

    @abstractmethod
    def selects_by_early_gate(self, layer_idx: int, length: int) -> bool:
        """Return whether a layer selects pages for `length` new tokens by their foretold experts."""

    @abstractmethod
    def foretell(self, layer_idx: int, experts: Tensor, weights: Tensor) -> None:
        """Foretell `experts` [B * q, k] and `weights` of the next tokens of a layer."""

    @abstractmethod
    def end_forward(self, ids: Tensor | None) -> None:
        """End the forward pass over the token `ids`.

        Raises:
            RuntimeError: the attention or the gate of a layer was not seen to run.
        """

    @abstractmethod
    def leave_forward(self) -> None:
        """Note that the forward pass is over, also if it has failed."""

    @abstractmethod
    def skip_forward(self) -> None:
        """Note that a forward pass of `generate` did not use this cache, which it was given."""
