"""Pages dealt to all places in turn.

Shapes: R rows, H KV heads, S new pages.
"""

from dataclasses import dataclass

from torch import Tensor

from ..storage.places import NewPages
from .sharding import Dealt, Sharding, in_turn


@dataclass(frozen=True, kw_only=True)
class Spread(Sharding):
    """Deals the pages of a layer in turn, and begins with another place in each layer.

    Where KV heads have equally many pages, N each, no place holds more than 1 + R / N times the mean of
    R places, whatever the text; otherwise the pages of all heads together are even. What a query sends
    and receives does not grow with the text: "Move the Query, Not the
    Cache" (arXiv 2606.01502), Helix (arXiv 2507.07120).
    """

    def deal(self, new: NewPages, places: Dealt) -> Tensor:
        return in_turn(new, places)
