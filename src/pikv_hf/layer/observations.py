"""Queries and token statistics of one layer, for methods that depend on its attention."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..schedulers import Needs
from ..storage.memory import on_device

EVERY = 2**62
# Up to 1/4 more queries than needed are held, so that they are not copied at every step.
SLACK = 4
# Maximum number of drafted tokens whose queries may have to be taken back.
DRAFTED = 256


class Trail:
    """The newest queries [B, H, G, n, D]: parts that are concatenated only when they are read."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._max_count = EVERY
        self._count = 0

    def append(self, newer: Tensor, max_count: int) -> None:
        """Append a copy of `newer`, and keep the newest `max_count` of all queries."""
        self._parts.append(newer[:, :, :, -max_count:].clone())
        self._max_count = max_count
        self._count += self._parts[-1].shape[3]
        if self._count > max_count + max_count // SLACK:
            self.read()

    def append_padded(self, newer: Tensor, max_count: int) -> None:
        """Append `newer`, zeros at padding, and keep the newest `max_count` queries of each row."""
        parts = torch.cat([*self._parts, newer], dim=3)
        is_query = parts.ne(0).any(-1).any(2).any(1)
        newest = is_query.int().argsort(dim=1, stable=True)[:, -max_count:]
        index = newest[:, None, None, :, None].expand(*parts.shape[:3], -1, parts.shape[4])
        self._max_count = max_count
        self.set(parts.gather(3, index))

    def read(self) -> Tensor | None:
        if len(self._parts) > 1:
            newest = torch.cat(self._parts, dim=3)
            over = newest.shape[3] - self._max_count
            self.set(newest[:, :, :, over:].clone() if over > 0 else newest)
        return self._parts[0] if self._parts else None

    def __len__(self) -> int:
        """Return the number of parts that `read` would concatenate."""
        return len(self._parts)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._parts

    def set(self, queries: Tensor | None) -> None:
        self._parts = [] if queries is None else [queries]
        self._count = 0 if queries is None else queries.shape[3]


class Observations:
    """Copies of the newest queries of one layer, and the token statistics of its scheduler.

    Attributes:
        queries: [B, H, G, n, D] of the newest n tokens and the G query heads of each KV head; zeros
            at padding. n <= `max_queries`, or more while drafting.
        control: [B, controls], the row state of the scheduler; None until it is first read.
        width: numbers of a record (the statistics of a token) that queries change; 0 = none.
        pending: queries that the records do not include yet.
        record: [B, H, t, numbers], the records of the oldest t tail tokens.
        counted: [B, H, T, width], the records of all tokens with the pending queries; None unless
            attention has added these.
        is_marked: True if a record is one number that only a repetition changes.
    """

    def __init__(
        self, max_queries: int, width: int = 0, controls: int = 0, *, is_marked: bool = False
    ) -> None:
        self.max_queries, self.width = max_queries, width
        self.controls, self.is_marked = controls, is_marked
        self.is_drafting = False
        self._queries, self._pending = Trail(), Trail()
        self.record: Tensor | None = None
        self.counted: Tensor | None = None
        self.control: Tensor | None = None

    @classmethod
    def for_needs(cls, needs: Needs) -> "Observations":
        """Make observations that provide `needs`."""
        width = 0 if needs.statistics is None else needs.statistics.num_statistics
        row_state = 0 if needs.row_state is None else needs.row_state.num_row_state
        return cls(needs.queries, width, row_state, is_marked=needs.repetition is not None)

    @property
    def queries(self) -> Tensor | None:
        return self._queries.read()

    @property
    def pending(self) -> Tensor | None:
        return self._pending.read()

    @property
    def has_pending(self) -> bool:
        return len(self._pending) > 0

    def is_pending(self, generated: int, page_size: int) -> bool:
        """Return True if pending queries must be settled although no token is sealed.

        They must be after a prompt, and after `page_size` forward passes.
        """
        return self.has_pending and (not generated or len(self._pending) >= page_size)

    def set_record(self, record: Tensor) -> None:
        """Set the records [B, H, t, numbers] of the oldest t tail tokens."""
        self.record = record

    def count(self, counted: Tensor) -> None:
        """Set the records [B, H, T, width] of all tokens, with the pending queries."""
        self.counted = counted

    def forget_counted(self) -> None:
        """Forget `counted`: the pending queries are added when they are settled."""
        self.counted = None

    def begin_drafting(self) -> None:
        """Keep more queries from now on, as some may be taken back."""
        self.is_drafting = True

    def settle(self) -> None:
        """Forget the pending queries, which the records include now."""
        self._pending.set(None)
        self.counted = None

    def anew(self) -> "Observations":
        """Return observations for the same needs, without any query."""
        return Observations(self.max_queries, self.width, self.controls, is_marked=self.is_marked)

    @property
    def numbers(self) -> int:
        """Numbers of a record."""
        return self.width or int(self.is_marked)

    @property
    def _max_held(self) -> int:
        """Maximum number of queries held for the method, and of drafted tokens."""
        return self.max_queries + DRAFTED * self.is_drafting

    @property
    def limit(self) -> int:
        """Number of newest queries that are needed."""
        return EVERY if self.width else self.max_queries and self._max_held

    def append(self, queries: Tensor, visible: Tensor | None) -> None:
        """Append `queries` [B, H, G, q, D]; `visible` [B, q] is False at padding; None = none."""
        queries = queries.detach()
        if visible is not None:
            seen = visible[:, None, None, :, None]
            queries = queries * seen.to(queries.device, queries.dtype)
        if self.max_queries and visible is None:
            self._queries.append(queries, self._max_held)
        elif self.max_queries:
            self._queries.append_padded(queries, self._max_held)
        if self.width:
            self._pending.append(queries, EVERY)

    def drop(self, tokens: int) -> None:
        """Forget the records of the oldest `tokens` tail tokens, which leave the tail."""
        if self.record is not None:
            self.record = self.record[:, :, tokens:].clone()

    def truncate(self, removed: int, opened: int, visible: Tensor | None) -> None:
        """Forget the newest `removed` columns; `opened` columns are left in the tail.

        `visible` [B, removed] is False where a removed column is padding; None = nowhere.
        """
        if removed:
            self._pending.set(_without_newest(self._pending.read(), removed))
            newest = self._queries.read()
            if visible is None or newest is None:
                self._queries.set(_without_newest(newest, removed))
            else:
                self._queries.set(_shifted(newest, visible.sum(1).to(newest.device)))
            self.counted = None
        if self.record is not None:
            self.record = self.record[:, :, :opened]

    def map_rows(self, index: Tensor) -> None:
        self.counted = None
        for trail in (self._queries, self._pending):
            held = trail.read()
            if held is not None:
                trail.set(held.index_select(0, index.to(held.device)))
        for name in ("record", "control"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, index.to(held.device)))

    def of_rows(self, rows: list[int], newest: int) -> Tensor | None:
        """Return queries [R, H, G, n, D] of at most `newest` tokens; None if there are none."""
        queries = self.queries if newest else None
        if queries is None:
            return None
        queries = queries[:, :, :, -newest:]
        if rows == list(range(queries.shape[0])):
            return queries
        return queries.index_select(0, on_device(tuple(rows), queries.device))

    def max_bytes(self, owners: int, opened: int, sealed: int) -> int:
        """Return the maximum of the bytes held, records of sealed tokens not counted.

        `owners`: rows times KV heads. The tail has at most `opened` tokens; pending queries are
        settled after every `sealed` tokens.
        """
        size = 4 * owners * opened * (self.numbers + self.width)
        size += 0 if self.control is None else self.control.nbytes
        needed = self._max_held
        for held, count in ((self.queries, needed + needed // SLACK), (self.pending, sealed)):
            size += 0 if held is None else held[:, :, :, 0].nbytes * count
        return size

    def control_of(self, rows: list[int], like: Tensor) -> Tensor:
        """Return the row state [R, controls]: at first zeros, on the device of `like` [B, ...]."""
        if self.control is None:
            self.control = like.new_zeros(like.shape[0], self.controls, dtype=torch.float32)
        return self.control[rows]

    def set_control(self, rows: list[int], control: Tensor) -> None:
        assert self.control is not None, "`control_of` has made the row state"
        self.control[rows] = control

    def tensors(self) -> Iterator[Tensor]:
        yield from self._queries.tensors()
        yield from self._pending.tensors()
        held = (self.record, self.counted, self.control)
        yield from (tensor for tensor in held if tensor is not None)


def _without_newest(queries: Tensor | None, removed: int) -> Tensor | None:
    left = 0 if queries is None else queries.shape[3] - removed
    return queries[:, :, :, :left].clone() if queries is not None and left > 0 else None


def _shifted(queries: Tensor, tokens: Tensor) -> Tensor:
    """Return `queries` [B, H, G, n, D] without the newest `tokens[r]` of row r, zeros in front."""
    place = torch.arange(queries.shape[3], device=tokens.device) - tokens[:, None]
    index = place.clamp_min(0)[:, None, None, :, None].expand(queries.shape)
    return queries.gather(3, index) * (place >= 0)[:, None, None, :, None]
