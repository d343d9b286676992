"""Routers that read pages in turn: PiKV's R_B."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..storage.hashing import hashed, short_seed
from ..validation import check_count, check_seed
from .page_router import PageRouter, Pages, Query


@dataclass(frozen=True)
class RoundRobin(PageRouter):
    """Puts page n into bucket n mod `buckets`, and reads the buckets in turn: a control.

    The query at position t reads bucket t mod `buckets` first, then the next ones, until it has
    its pages. PiKV's R_B (arXiv 2508.06526, table 1), with pages instead of tokens.
    """

    buckets: int = 8
    has_ties: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("buckets", self.buckets)

    def bucket(self, numbers: Tensor) -> Tensor:
        """Return the buckets of the pages with these `numbers`, int64."""
        return numbers % self.buckets

    def scores(self, query: Query, pages: Pages) -> Tensor:
        wait = (
            self.bucket(pages.numbers)[:, :, None, None] - query.positions()[:, None, None, :, None]
        )
        return -(wait % self.buckets).float()


@dataclass(frozen=True)
class Hash(RoundRobin):
    """As `RoundRobin`, but the bucket of a page is a hash of `seed` and the page's number."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)

    def bucket(self, numbers: Tensor) -> Tensor:
        return hashed(numbers + (short_seed(self.seed) << 32)).long() % self.buckets
