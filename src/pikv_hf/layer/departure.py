"""The tokens that leave the tail at a seal; each row depends on its own tokens alone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..storage.memory import on_device
from ..storage.token_table import TokenTable
from .allowance import is_over_budget, row_window
from .state import LayerState


@dataclass(frozen=True)
class Departing:
    """Batch rows of which equally many tokens have left the tail, leave it now, and stay.

    Of each row `departed` tokens have left the tail before, `count` leave it now and `opened` stay.
    `places` [R, count + opened] are the places of leaving and staying tokens in the tail's buffer,
    oldest first. None = in every row they are the places from `first` on.
    """

    rows: list[int]
    departed: int
    count: int
    opened: int
    first: int
    places: Tensor | None

    def select(self, numbers: list[int]) -> "Departing":
        """Return the group of some of these rows, given by their indices in `rows`."""
        if len(numbers) == len(self.rows):
            return self
        rows = [self.rows[number] for number in numbers]
        places = None if self.places is None else self.places[numbers]
        return replace(self, rows=rows, places=places)

    def leaving(self, tail: TokenTable) -> TokenTable:
        """Return the tokens of a `tail` that leave it."""
        return self._part(tail, 0, self.count)

    def staying(self, tail: TokenTable) -> TokenTable:
        """Return the tokens of a `tail` that stay in it."""
        return self._part(tail, self.count, self.opened)

    def _part(self, tail: TokenTable, start: int, count: int) -> TokenTable:
        if self.places is None:
            return tail.of_rows(self.rows).narrow(self.first + start, count)
        return tail.select_places(self.rows, self.places[:, start : start + count])

    @property
    def left(self) -> int:
        """Number of tokens of each row that will have left the tail."""
        return self.departed + self.count

    @property
    def seen(self) -> int:
        """Number of tokens that each row has seen, padding not counted."""
        return self.departed + self.count + self.opened


@dataclass(frozen=True)
class Departure:
    """The rows of a layer, grouped, with `starts` and `num_departed` after tokens have left."""

    groups: list[Departing]
    starts: tuple[int, ...]
    num_departed: tuple[int, ...]
    # [B, n] places in the tail's buffer: first the tail tokens of a row, oldest first.
    order: Tensor

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row that leave its tail."""
        counts = {row: group.count for group in self.groups for row in group.rows}
        return [counts[row] for row in range(len(self.starts))]

    @property
    def is_empty(self) -> bool:
        return not any(group.count for group in self.groups)

    def leaving(self, tail: TokenTable) -> TokenTable:
        """Return the tokens that leave a `tail`; rows with fewer have arbitrary entries behind."""
        if len(self.groups) == 1:
            return self.groups[0].leaving(tail)
        rows = list(range(len(self.starts)))
        return tail.select_places(rows, self.order[:, : max(self.lengths)])


def open_places(state: LayerState) -> Tensor | None:
    """Return [B, n] bool, True where the buffer has a tail token of the row; None = everywhere."""
    first, end, starts = state.first_in_tail, state.num_seen, state.starts
    key = (state.columns.stamp, first, end, starts)
    return state.step.remember("open", key, lambda: _open_places(state))


def _open_places(state: LayerState) -> Tensor | None:
    first, end = state.first_in_tail, state.num_seen
    visible, starts = state.columns.visible(first, end), state.starts
    if all(start == first for start in starts):
        return None if visible is None else visible.expand(len(starts), -1)
    is_open = torch.arange(first, end) >= torch.tensor(starts)[:, None]
    return is_open if visible is None else is_open & visible


def departure(state: LayerState) -> Departure:
    """Return the tokens that leave the tails now, computed once for layers with equal tails."""
    key = (state.columns.stamp, state.num_seen, state.starts, state.num_departed, state.prompt_end)
    key += (state.tail.keys.device,)
    return state.step.remember("departure", key, lambda: _departure(state))


def _departure(state: LayerState) -> Departure:
    is_open, departed, first = open_places(state), state.num_departed, state.first_in_tail
    length = state.tail.length
    held = [length] * len(departed) if is_open is None else is_open.sum(1).tolist()
    counts = {pair: _count(state, *pair) for pair in set(zip(departed, held, strict=True))}
    alike: dict[tuple[int, int], list[int]] = {}
    for row, pair in enumerate(zip(departed, held, strict=True)):
        alike.setdefault(pair, []).append(row)
    if is_open is None:
        order = torch.arange(length).expand(len(departed), -1)
    else:
        order = (~is_open).int().argsort(dim=1, stable=True)
    # Uploaded once for all layers.
    here = order if is_open is None else order.to(state.tail.keys.device)
    groups = []
    for (before, opened), rows in alike.items():
        count, places = counts[before, opened], order[rows, :opened]
        oldest = int(places[0, 0]) if opened else length
        is_run = bool((places == torch.arange(oldest, oldest + opened)).all())
        index = on_device(tuple(rows), here.device)
        at = None if is_run else here.index_select(0, index)[:, :opened]
        groups.append(Departing(rows, before, count, opened - count, oldest, at))
    starts, left = list(state.starts), list(departed)
    for group in groups:
        for row in group.rows:
            left[row] += group.count
            starts[row] = first + int(order[row, group.count]) if group.opened else state.num_seen
    return Departure(groups, tuple(starts), tuple(left), here)


def _count(state: LayerState, departed: int, held: int) -> int:
    """Return how many of the `held` tail tokens of a row leave; `departed` have left before.

    From a row within its budget whole pages leave, from a row over its budget all tokens outside
    the window.
    """
    seen = departed + held
    count = max(held - row_window(state, seen), 0)
    if is_over_budget(state, seen):
        return count
    return count // state.settings.page_size * state.settings.page_size
