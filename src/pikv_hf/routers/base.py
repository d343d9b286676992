"""The base class of routers, which select pages by the experts of their tokens."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..storage.token_table import TokenTable


class Router(ABC):
    """Selects pages for a query by the labels that the model's own gates gave to tokens.

    A router is a frozen dataclass: its configuration, without run state. A cache with a router
    records labels: `experts` int16 and `weights` of each token. The tail is always read.
    """

    @abstractmethod
    def select(self, query: Tensor, meta: TokenTable, pages: int) -> Tensor | None:
        """Return indices [R, H, K] int64 < `pages` of the pages that `query` [R, H, G, D] reads.

        `meta` has columns [R or 1, H or 1, pages * P, ...] of the tokens of all pages: `positions`,
        and `experts` and `weights` [..., k] in a layer with a gate. Return None to read all pages,
        in place. Changes nothing.
        """
