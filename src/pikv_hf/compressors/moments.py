"""Second moments of keys or values, from which principal axes are computed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of states [H, n, D], as sums for each KV head in float64.

    `count` states have the sum `first` [H, D]; their outer products have the sum `second`
    [H, D, D]. The memory does not grow with the number of states.
    """

    count: int
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, states: Tensor) -> "Moments":
        """Compute the moments of `states` [H, n, D]."""
        exact = (states.cpu() if states.device.type == "mps" else states).double()
        return cls(states.shape[1], exact.sum(dim=1).cpu(), (exact.mT @ exact).cpu())

    def plus(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    def times(self, factor: Tensor) -> "Moments":
        """Return the moments of the states times `factor` [H]."""
        first, second = self.first * factor[:, None], self.second * factor.square()[:, None, None]
        return Moments(self.count, first, second)

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    @property
    def size(self) -> Tensor:
        """Root mean square [H] of the numbers of a head."""
        squares = self.second.diagonal(dim1=-2, dim2=-1).mean(-1)
        return (squares / self.count).sqrt()

    def axes(self, rank: int, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return the `rank` largest principal axes [H, r, D], in order, and all eigenvalues [H, D].

        The eigenvalues after the r-th add up to the mean squared error of the projection.
        """
        spread = self.second / self.count
        if centred:
            spread = spread - self.mean[..., None] * self.mean[:, None]
        values, vectors = torch.linalg.eigh(spread)
        return vectors.flip(-1)[..., :rank].mT.contiguous(), values.flip(-1)
