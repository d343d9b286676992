"""Policies that decide which pages stay near when others are fetched.

Shapes: R rows, H KV heads, C slots for pages on the device.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Residency(ABC):
    """Chooses the pages that leave the device for pages that are fetched. No run state."""

    @abstractmethod
    def utility(self, now: int, last: Tensor, uses: Tensor, gap: Tensor) -> Tensor:
        """Return the utility [R, H, C] of the pages in the slots; the lowest leave first.

        `last` [R, H, C] is the step at which a page was read last, `now` the present step, `uses` how
        often it was read since it was fetched, and `gap` the moving average of the steps between two
        reads. All are float32.
        """


@dataclass(frozen=True)
class Lru(Residency):
    """The page that was not read for longest leaves: u = -r of PiKV (arXiv 2508.06526)."""

    def utility(self, now: int, last: Tensor, uses: Tensor, gap: Tensor) -> Tensor:
        return last


@dataclass(frozen=True)
class LruPlus(Residency):
    """As `Lru`, but each read of a page is worth `weight` steps: u = -r + weight f of PiKV."""

    weight: float = 4.0

    def utility(self, now: int, last: Tensor, uses: Tensor, gap: Tensor) -> Tensor:
        return last + self.weight * uses


@dataclass(frozen=True)
class Belady(Residency):
    """The page leaves that is expected to be read last, as in Belady's optimal policy.

    A page is expected one average gap after its last read; if it is overdue, as late as it is overdue
    and one gap more. The idea is of the authors' newer code (NoakLiu/PiKV, "Belady-approx").
    """

    def utility(self, now: int, last: Tensor, uses: Tensor, gap: Tensor) -> Tensor:
        ahead = last + gap - now
        return -torch.where(ahead >= 0, ahead, gap - ahead)


RESIDENCIES: dict[str, type[Residency]] = {"lru": Lru, "lru_plus": LruPlus, "belady": Belady}
