"""Flags of finite keys and values that are read from an accelerator without waiting for it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layer.checks import naming
from ..layer.state import LayerState
from ..storage.finite import refuse_if_not


class Sent(NamedTuple):
    """Flags [n, 2] on their way to the CPU, of the layers `states`; `arrived` follows them."""

    arrived: torch.Event
    flags: Tensor
    states: list[LayerState]


class FiniteFlags:
    """Tells whether keys and values that were sealed on an accelerator are finite.

    A seal does not wait for its flags: they are copied behind it, and read when the cache is used
    after they have arrived.
    """

    def __init__(self) -> None:
        self._sent: list[Sent] = []

    def reset(self) -> None:
        """Forget all flags."""
        self._sent = []

    def send(self, states: Iterable[LayerState]) -> None:
        """Copy the flags of the pass that ends to the CPU, all of a device at once."""
        found: dict[torch.device, list[tuple[Tensor, LayerState]]] = {}
        for state in states:
            for flags in state.pages.take_unread():
                found.setdefault(flags.device, []).append((flags, state))
        for device, pairs in found.items():
            flags = torch.stack([flags for flags, _ in pairs]).to("cpu", non_blocking=True)
            arrived = torch.Event(device)
            arrived.record(torch.accelerator.current_stream(device))
            self._sent.append(Sent(arrived, flags, [state for _, state in pairs]))

    def read(self, *, wait: bool = False) -> None:
        """Read the flags that have arrived, or if `wait` all.

        Raises:
            ValueError: keys or values of a layer were not finite; raised again until `reset`.
        """
        for sent in tuple(self._sent):
            if wait:
                sent.arrived.synchronize()
            elif not sent.arrived.query():
                continue
            for finite, state in zip(sent.flags.tolist(), sent.states, strict=True):
                with naming(state):
                    refuse_if_not(finite, state.pages.codec)
            self._sent.remove(sent)

    def __getstate__(self) -> dict[str, Any]:
        """Copy no flags: all are read before."""
        self.read(wait=True)
        return vars(self)
