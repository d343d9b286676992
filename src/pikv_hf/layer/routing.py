"""The run state of the router of one layer, and what it has selected.

Shapes: B batch rows, H KV heads, R queries of each.
"""

import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..storage.page_list import PageList
from ..storage.selected import Selection
from .plan import Plan
from .resident import Resident


class Read:
    """What the newest token has read of one store, without keeping the store alive.

    `page_bytes`: of the store. `readers`: the batch rows that read it.
    """

    def __init__(self, selection: Selection, length: int, fetched: int | None) -> None:
        """Note a selection for `length` new tokens: each reader is in it `length` times.

        `fetched`: pages that were not on the device; None = all or none, as the store is far or near.
        """
        store = selection.store
        self.page_bytes, self.readers = selection.page_bytes, store.readers
        self._fetched = 0 if fetched is None and not store.tier.is_far else fetched
        self._page_size, self._store = store.page_size, weakref.ref(store)

        def newest(each: Tensor) -> Tensor:
            return each if length == 1 else each[length - 1 :: length]

        self._index = newest(selection.index)
        self._rows = None if selection.rows is None else newest(selection.rows)
        self._tokens = None if selection.tokens is None else newest(selection.tokens)

    @property
    def pages(self) -> int:
        """Pages of all rows and KV heads."""
        return self._index.numel() if self._tokens is None else int((self._tokens > 0).sum())

    @property
    def misses(self) -> int:
        """Pages that were not on the device, of all rows and KV heads."""
        return self.pages if self._fetched is None else self._fetched

    @property
    def tokens(self) -> int:
        """Tokens of all rows and KV heads."""
        if self._tokens is None:
            return self._index.numel() * self._page_size
        return int(self._tokens.sum())

    @property
    def selection(self) -> Selection | None:
        """The selection; None if the store is gone."""
        store = self._store()
        return None if store is None else Selection(store, self._rows, self._index, self._tokens)

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self._index, self._rows, self._tokens) if t is not None)


class Routing:
    """The run state of the router in one layer.

    Attributes:
        state: [B, ...], what the router has returned; None = nothing.
        reads: what the newest token has read of each store; None = all pages, or nothing yet.
        plan: the plan for the pages as they were when pages were last selected.
        resident: copies on the device of pages that were read from far memory; None = there are none.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None
        self.reads: list[Read] | None = None
        self.plan: Plan | None = None
        self.resident: Resident | None = None
        # The sum of the shares of attention that were found, and their number.
        self._recall: Tensor | None = None
        self._lists: list[PageList] = []

    def set_state(self, state: Tensor | None) -> None:
        self.state = state

    def set_resident(self, resident: Resident | None) -> None:
        self.resident = resident

    def note(
        self, selections: list[Selection] | None, length: int = 1, fetched: int | None = None
    ) -> None:
        """Note what `length` new tokens read; None = all pages. `fetched` is as for `Read`."""
        self.reads = None
        if selections is not None:
            self.reads = [Read(each, length, fetched) for each in selections]

    def measure(self, read: Tensor, whole: Tensor) -> None:
        """Add the share of attention that queries found in what they read.

        `read` and `whole` [parts, B, H, R] are the log-sum-exps over what they read, and over all.
        """
        shares = (read.logsumexp(0) - whole.logsumexp(0)).exp()
        new = torch.stack([shares.sum(), shares.new_full((), shares.numel())])
        self._recall = new if self._recall is None else self._recall + new

    @property
    def recall(self) -> float | None:
        """Mean share of attention that was found in what was read; None if it was not measured."""
        if self._recall is None:
            return None
        found, count = self._recall.tolist()
        return found / count

    def forget_plan(self) -> None:
        """Forget the plan, which keeps the digests of pages that are gone."""
        self.plan, self._lists = None, []

    def plan_for(self, lists: list[PageList], make: Callable[[], Plan]) -> Plan:
        """Return the plan for the pages `lists`, made anew if they are not those of the last plan."""
        is_same = len(lists) == len(self._lists) and all(map(operator.is_, lists, self._lists))
        if self.plan is None or not is_same:
            self.plan, self._lists = make(), lists
        return self.plan

    def map_rows(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(0, index.to(self.state.device))
        self.reads, self.plan, self.resident, self._lists = None, None, None, []

    def tensors(self) -> Iterator[Tensor]:
        yield from () if self.state is None else (self.state,)
        for read in self.reads or ():
            yield from read.tensors()
        yield from () if self.resident is None else self.resident.tensors()
        yield from () if self._recall is None else (self._recall,)
        yield from () if self.plan is None else self.plan.tensors()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again."""
        return vars(self) | {"reads": None, "plan": None, "resident": None, "_lists": []}
