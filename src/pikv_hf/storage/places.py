"""The places where the pages of one layer live: devices of this process, or other ranks.

Shapes: R rows, H KV heads, S new pages, P tokens a page, k experts of a token; B batch rows, Q queries
of a KV head, Dv value dim.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .tiers import Near, Tier


class NewPages(NamedTuple):
    """Pages that are dealt to places.

    `filled` [R, H, S] counts their tokens; 0 = there is no page. With H = 1, the pages of all KV heads
    go to one place. `dealt` pages of a KV head were dealt before, and the places hold `loads` pages.
    `experts` and `weights` [R, H, S, P, k] are the labels of the tokens; None = they have none.
    """

    filled: Tensor
    dealt: int
    loads: tuple[int, ...]
    experts: Tensor | None = None
    weights: Tensor | None = None


class Exchange(ABC):
    """What ranks that share one cache send each other; all ranks call each method together.

    `bytes_sent`: bytes that this rank has sent.
    """

    bytes_sent: int = 0

    @abstractmethod
    def partials(
        self, out: Tensor, lse: Tensor, check: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the partial results of all ranks, of this rank's `out` [B, H, Q, Dv] and `lse`.

        `check` [] is a number that is equal on all ranks, unless they have drifted apart.

        Raises:
            RuntimeError: the ranks have drifted apart, or a rank has stopped.
        """

    @abstractmethod
    def note_failure(self) -> None:
        """Let the other ranks know, when they ask, that this rank has failed."""

    @abstractmethod
    def fields(
        self, fields: list[dict[str, Tensor]], owners: list[int], device: torch.device
    ) -> list[dict[str, Tensor]]:
        """Return the encoded pages of all stores on `device`.

        `fields` of a store have shapes only, unless this rank is its owner.
        """


class Places(ABC):
    """Deals the pages of one layer to places. No run state."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of places."""

    def name(self, place: int) -> str | None:
        """Return the name of a place in reports; None if it is the only one."""
        return None

    @property
    def by_experts(self) -> bool:
        """True if pages of different rows may be dealt to different places, by their labels."""
        return False

    @property
    def exchange(self) -> Exchange | None:
        """The ranks among which the places are; None = all places are in this process."""
        return None

    @abstractmethod
    def tiers(self, place: int, device: torch.device) -> list[Tier]:
        """Return the tiers of a place, which are filled in this order; the last one has no limit.

        `device` is the device of the layer.
        """

    @abstractmethod
    def deal(self, new: NewPages) -> Tensor:
        """Return the place of each page, [R, H, S]."""


class OnePlace(Places):
    """The memory of the device of the layer."""

    @property
    def count(self) -> int:
        return 1

    def tiers(self, place: int, device: torch.device) -> list[Tier]:
        return [Near(device)]

    def deal(self, new: NewPages) -> Tensor:
        return torch.zeros_like(new.filled)
