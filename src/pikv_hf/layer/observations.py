"""The queries of one layer, for methods that ask what is attended to."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..schedulers import Needs

EVERY = 2**62
# At most 1/4 of the queries that are kept are older than they need be.
SLACK = 4
# Drafted tokens whose queries may have to be taken back.
DRAFTED = 256


class Trail:
    """The newest queries [B, H, G, n, D], put side by side when they are read and not at every step."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._most = EVERY
        self._count = 0

    def append(self, newer: Tensor, most: int) -> None:
        """A copy of `newer`; of all, the newest `most` are kept."""
        self._parts.append(newer[:, :, :, -most:].clone())
        self._most = most
        self._count += self._parts[-1].shape[3]
        if self._count > most + most // SLACK:
            self.read()

    def read(self) -> Tensor | None:
        if len(self._parts) > 1:
            newest = torch.cat(self._parts, dim=3)
            over = newest.shape[3] - self._most
            self.set(newest[:, :, :, over:].clone() if over > 0 else newest)
        return self._parts[0] if self._parts else None

    def __len__(self) -> int:
        """How many times something was appended since all was read."""
        return len(self._parts)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._parts

    def set(self, queries: Tensor | None) -> None:
        self._parts = [] if queries is None else [queries]
        self._count = 0 if queries is None else queries.shape[3]


class Observations:
    """Queries [B, H, G, n, D] of the newest n tokens, at most `most`, of each KV head's G heads.

    Those of padding are zeros. Copies: nothing keeps the prompt's queries alive. `control`
    [B, controls] is what schedulers keep of each row.

    For schedulers that keep a record of `width` numbers of each token, `pending` are the queries that
    records do not contain yet, and `record` [B, H, t, width] those of the oldest t open tokens. If
    attention itself has added the pending queries, `counted` [B, H, T, width] are the records of all
    tokens held with them. If `is_marked` a record is one number that only a repetition changes.
    """

    def __init__(
        self, most: int, width: int = 0, controls: int = 0, *, is_marked: bool = False
    ) -> None:
        self.most, self.width, self.controls, self.is_marked = most, width, controls, is_marked
        self.is_drafting = False
        self._queries, self._pending = Trail(), Trail()
        self.record: Tensor | None = None
        self.counted: Tensor | None = None
        self.control: Tensor | None = None

    @classmethod
    def for_needs(cls, needs: Needs) -> "Observations":
        """Observations as methods need them."""
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
        """Whether queries are to be settled without sealing: of a prompt, or of as many tokens as a page."""
        return self.has_pending and (not generated or len(self._pending) >= page_size)

    def set_record(self, record: Tensor) -> None:
        """The records [B, H, t, width] of the oldest t tokens of the tail."""
        self.record = record

    def count(self, counted: Tensor) -> None:
        """Attention has added the pending queries: the records [B, H, T, width] of all tokens."""
        self.counted = counted

    def forget_counted(self) -> None:
        """The pending queries are not counted: they are asked again when tokens are sealed."""
        self.counted = None

    def begin_drafting(self) -> None:
        """More queries are kept, of which some may be taken back."""
        self.is_drafting = True

    def settle(self) -> None:
        """The records contain all queries."""
        self._pending.set(None)
        self.counted = None

    def anew(self) -> "Observations":
        """Nothing observed yet."""
        return Observations(self.most, self.width, self.controls, is_marked=self.is_marked)

    @property
    def numbers(self) -> int:
        """How many numbers a record has."""
        return self.width or int(self.is_marked)

    @property
    def limit(self) -> int:
        """How many of the newest queries are wanted."""
        return EVERY if self.width else self.most and self.most + DRAFTED * self.is_drafting

    def append(self, queries: Tensor, visible: Tensor | None) -> None:
        """`queries` [B, H, G, q, D] of new tokens, `visible` [B or 1, q] where they are no padding."""
        newest = queries[:, :, :, -self.limit :].detach()
        if visible is not None:
            seen = visible[:, None, None, -self.limit :, None]
            newest = newest * seen.to(newest.device, newest.dtype)
        if self.most:
            self._queries.append(newest, self.most + DRAFTED * self.is_drafting)
        if self.width:
            self._pending.append(newest, EVERY)

    def drop(self, tokens: int) -> None:
        """The oldest `tokens` open tokens are open no more."""
        if self.record is not None:
            self.record = self.record[:, :, tokens:].clone()

    def truncate(self, removed: int, opened: int) -> None:
        """Forget the newest `removed` tokens; `opened` stay open."""
        if removed:
            for trail in (self._queries, self._pending):
                trail.set(_without_newest(trail.read(), removed))
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
        """Those of at most `newest` tokens, [R, H, G, n, D]; None before any, or for 0."""
        queries = self.queries if newest else None
        if queries is None:
            return None
        queries = queries[:, :, :, -newest:]
        if rows == list(range(queries.shape[0])):
            return queries
        return queries.index_select(0, torch.tensor(rows, device=queries.device))

    def most_bytes(self, owners: int, opened: int, sealed: int) -> int:
        """Bytes held at most, the records of pages apart, for the KV heads of all rows, `owners`.

        `opened` tokens are open at most; after every `sealed` ones records are settled.
        """
        size = 4 * owners * opened * (self.numbers + self.width)
        size += 0 if self.control is None else self.control.nbytes
        kept = self.most + DRAFTED * self.is_drafting
        for held, most in ((self.queries, kept + kept // SLACK), (self.pending, sealed)):
            size += 0 if held is None else held[:, :, :, 0].nbytes * most
        return size

    def control_of(self, rows: list[int], like: Tensor) -> Tensor:
        """The controls [R, controls] of batch rows, made on the device of `like` [B, ...]."""
        if self.control is None:
            self.control = like.new_zeros(like.shape[0], self.controls, dtype=torch.float32)
        return self.control[rows]

    def set_control(self, rows: list[int], control: Tensor) -> None:
        assert self.control is not None, "the controls were asked for"
        self.control[rows] = control

    def tensors(self) -> Iterator[Tensor]:
        yield from self._queries.tensors()
        yield from self._pending.tensors()
        held = (self.record, self.counted, self.control)
        yield from (tensor for tensor in held if tensor is not None)


def _without_newest(queries: Tensor | None, removed: int) -> Tensor | None:
    left = 0 if queries is None else queries.shape[3] - removed
    return queries[:, :, :, :left].clone() if queries is not None and left > 0 else None
