"""Which experts a page belongs to, and which pages a query reads."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..storage.token_table import TokenTable


class Router(ABC):
    """Reads the labels that the model's own gates gave to tokens, and selects pages for a query.

    A router is a frozen dataclass: its own configuration, without run state. A cache with a router
    records labels: `experts` int16 and `weights` of each token. The tail is always read, whatever
    is selected.
    """

    @abstractmethod
    def select(self, query: Tensor, meta: TokenTable, pages: int) -> Tensor | None:
        """Indices [R, H, K] int64 of the pages that `query` [R, H, G, D] reads, out of `pages`.

        `meta` is what is known of the tokens of these pages, [R or 1, H or 1, pages * P, ...]:
        `positions`, and `experts` and `weights` [..., k] in a layer with a gate. None reads all
        pages, in place. Changes nothing.
        """
