"""Sealing: the oldest visible tokens of each batch row that are kept move from tail to pages."""

import torch
from torch import Tensor

from ..model.masks import rows_by_visibility
from ..storage.room import Room
from ..storage.token_table import TokenTable
from .allowance import excess, spare_bytes
from .autocast import without_autocast
from .checks import naming
from .eviction import select_tokens
from .records import settle_held, settled
from .state import LayerState

# Batch rows that are sealed together, and the columns of the tail that they see: None = all.
Groups = list[tuple[list[int], Tensor | None]]


def seal_excess(state: LayerState) -> int:
    """Seal the oldest tokens of the tail that are due, and return their number."""
    count, due = excess(state) if state.num_seen >= state.due else (0, state.due)
    if count > 0:
        state.step.note_sealed()
        seal_oldest(state, count)
    elif not state.pages.slabs and state.observed.is_pending(
        state.num_generated, state.pages.page_size
    ):
        state.step.note_sealed()
        settle_held(state)
    state.expect_sealing(due)
    return count


@without_autocast
def seal_oldest(state: LayerState, count: int) -> None:
    """Seal the oldest `count` tokens of the layer's tail.

    Raises:
        ValueError: the compressor cannot store them.
    """
    oldest = state.tail.span(state.first_in_tail, count)
    groups = _groups(state, count)
    _note_padding(state, count, groups)
    for rows, columns in groups:
        span = oldest if len(rows) == state.tail.batch else oldest.select_rows(torch.tensor(rows))
        if columns is not None:
            span = span.select_tokens(columns)
        new, room = span, Room(spare_bytes(state))
        state.note_departed(rows, len(span))
        if state.settings.scheduler is not None:
            span, room = select_tokens(state, rows, span, count, state.settings.scheduler)
        if not len(span):
            continue  # no token is kept
        queries = state.observed.of_rows(rows, state.compressor.observed_queries)
        if queries is not None:
            queries = queries.flatten(2, 3) * state.scale
        with naming(state):
            state.pages.append(span, rows, state.tail.batch, queries, room)
            _examine(state, rows, new, queries)
    _end_records(state, count, groups)
    if oldest["keys"].device.type == "cpu":
        state.step.add_sealed_bytes(oldest["keys"].nbytes + oldest["values"].nbytes)


def _note_padding(state: LayerState, count: int, groups: Groups) -> None:
    """Note which of the oldest `count` tail tokens are in none of `groups`: they are padding."""
    batch, visible = state.tail.batch, None
    if sum(len(rows) for rows, _ in groups) < batch or any(c is not None for _, c in groups):
        visible = torch.zeros(batch, count, dtype=torch.bool)
        for rows, columns in groups:
            seen = torch.arange(count) if columns is None else columns
            visible[torch.tensor(rows)[:, None], seen] = True
    state.padding.append(state.first_in_tail, visible, count)


def _end_records(state: LayerState, count: int, groups: Groups) -> None:
    """Settle the rows that sealed nothing, too, and forget records of `count` tail tokens."""
    if state.observed.pending is not None:
        busy = {row for rows, _ in groups for row in rows}
        for row in set(range(state.tail.batch)) - busy:
            settled(state, [row], None)
        state.observed.settle()
    state.observed.drop(count)


def _examine(state: LayerState, rows: list[int], new: TokenTable, queries: Tensor | None) -> None:
    """Let guard and probe compare `new`, evicted tokens included, with their pages.

    Sealed tokens are not compared, as some of them may have been decoded: no original is left.
    """
    state.guard.check(
        state.compressor, state.pages, new, queries, state.num_departed[rows[0]], state.layer_idx
    )
    probes = state.observed.of_rows(rows, state.probe.observed_queries)
    if probes is not None:
        pages = state.pages.apart(new, queries)
        state.probe.measure(new, pages, probes.flatten(2, 3), state.scale, state.latent_rank)


def _groups(state: LayerState, count: int) -> Groups:
    """Group batch rows by the columns that they see of the first `count` in the tail.

    A column that the newest query may not see is padding, which never enters a page. For a
    scheduler the rows of a group have equal pages, too.
    """
    key = (state.mask, state.tail.length, count, state.tail.batch)
    groups = state.step.remember("groups", key, lambda: rows_by_visibility(*key))
    if state.settings.scheduler is None:
        return groups
    split: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for number, (rows, _) in enumerate(groups):
        for row in rows:
            key_of_row = number, state.num_departed[row], state.pages.signature(row)
            split.setdefault(key_of_row, []).append(row)
    return [(rows, groups[number][1]) for (number, *_), rows in split.items()]
