"""What the router of one layer selects from, and what it has selected.

Shapes: B batch rows, H KV heads, M pages of all stores, m pages of one store, n its readers.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..routers import Pages
from ..storage.page_list import PageList
from ..storage.ragged_pages import RaggedPages
from ..storage.selected import Selection
from ..storage.uniform_pages import UniformPages


@dataclass(frozen=True)
class Candidates:
    """The pages of one store for all batch rows: `places` [B, H, m] and valid `tokens` [B, H or 1, m].

    A row that does not read the store has any pages. `has_partial`: some pages are not full. `start`
    is the index of the first page among the pages of all stores.
    """

    store: UniformPages | RaggedPages
    pages: Pages
    places: Tensor
    tokens: Tensor
    has_partial: bool
    start: int

    @property
    def count(self) -> int:
        return self.places.shape[2]

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.pages.digests.values(), self.pages.numbers, self.places, self.tokens)


@dataclass(frozen=True)
class Plan:
    """What a router selects from, until pages change.

    `is_free` [B, H, 1, M] is True at pages that are read by their score; `bias` [B, H, 1, M] is
    infinity for pages that are always read, and minus infinity where there is no page. `others`
    [B, H, 1, M] is True where there is no full page; None = nowhere. A KV head reads up to `slots`
    pages, or `limits` [B, H]; None = all heads read `slots`. `reads_all`: every page is to be read.
    """

    candidates: list[Candidates]
    bias: Tensor
    is_free: Tensor
    others: Tensor | None
    slots: int
    limits: Tensor | None
    reads_all: bool

    def tensors(self) -> Iterator[Tensor]:
        for candidates in self.candidates:
            yield from candidates.tensors()
        yield from (self.bias, self.is_free)
        yield from (tensor for tensor in (self.others, self.limits) if tensor is not None)


@dataclass(frozen=True)
class Read:
    """What the newest query has read of one store: `places` pages of `page_size` tokens.

    If a page is not full, or a place empty, `held` [n, H, places of each] counts the tokens.
    """

    tier: str
    page_bytes: int
    page_size: int
    places: int
    held: Tensor | None

    @classmethod
    def of(cls, selection: Selection) -> "Read":
        store, places = selection.store, selection.places.numel()
        return cls(store.tier.name, store.page_bytes, store.page_size, places, selection.tokens)

    @property
    def pages(self) -> int:
        """Pages of all rows and KV heads."""
        return self.places if self.held is None else int((self.held > 0).sum())

    @property
    def tokens(self) -> int:
        """Tokens of all rows and KV heads."""
        return self.places * self.page_size if self.held is None else int(self.held.sum())


class Routing:
    """The run state of the router in one layer.

    Attributes:
        state: [B, ...], what the router has returned; None = nothing.
        reads: what the newest tokens have read of each store; None = all pages, or nothing yet.
        plan: the plan for the pages as they were when pages were last selected.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None
        self.reads: list[Read] | None = None
        self.plan: Plan | None = None
        self._lists: list[PageList] = []

    def set_state(self, state: Tensor | None) -> None:
        self.state = state

    def note(self, selections: list[Selection] | None) -> None:
        """Note what the newest tokens read; None = all pages."""
        self.reads = None if selections is None else [Read.of(each) for each in selections]

    def plan_for(self, lists: list[PageList], make: Callable[[], Plan]) -> Plan:
        """Return the plan for the pages `lists`, made anew if they are not those of the last plan."""
        is_same = len(lists) == len(self._lists) and all(map(operator.is_, lists, self._lists))
        if self.plan is None or not is_same:
            self.plan, self._lists = make(), lists
        return self.plan

    def map_rows(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(0, index.to(self.state.device))
        self.reads, self.plan, self._lists = None, None, []

    def tensors(self) -> Iterator[Tensor]:
        yield from () if self.state is None else (self.state,)
        yield from () if self.plan is None else self.plan.tensors()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again."""
        return {"state": self.state, "reads": None, "plan": None, "_lists": []}
