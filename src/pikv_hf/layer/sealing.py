"""Sealing: the oldest tail tokens of each row move into pages, or are evicted."""

from collections.abc import Iterator

from torch import Tensor

from ..storage.room import Room
from ..storage.token_table import TokenTable
from .allowance import spare_bytes
from .autocast import without_autocast
from .checks import naming
from .departure import Departing, Departure, departure
from .eviction import Selection, select_tokens
from .records import settle_held
from .state import LayerState


def seal_excess(state: LayerState) -> int:
    """Seal the tail tokens that are due, and return how many columns the tail's buffer can drop.

    Tokens leave after each forward pass over a prompt, and then after every `page_size` generated
    tokens. So all rows seal in one step, and each row when it would seal if it were alone.
    """
    if state.num_seen >= state.due:
        budget, page_size = state.settings.budget, state.settings.page_size
        # The first generated token may change the budget.
        changes = budget is not None and budget.has_phases and not state.num_generated
        state.expect_sealing(state.num_seen + (1 if changes else page_size))
        leaving = departure(state)
        if not leaving.is_empty:
            state.step.note_sealed()
            return seal_oldest(state, leaving)
    if not state.pages.slabs and state.observed.is_pending(
        state.num_generated, state.pages.page_size
    ):
        state.step.note_sealed()
        settle_held(state)
    return 0


@without_autocast
def seal_oldest(state: LayerState, leaving: Departure) -> int:
    """Seal the tokens that are `leaving`, and return how many columns the tail can drop.

    Raises:
        ValueError: the compressor cannot store these tokens.
    """
    tail = state.tail.span(state.first_in_tail, state.tail.length)
    newest = state.compressor.observed_queries
    are_alike = len(leaving.groups) == 1 or not (
        state.compressor.is_mixed or any(group.seen < newest for group in leaving.groups)
    )
    if state.settings.scheduler is None and are_alike:
        rows, room = list(range(state.tail.batch)), Room(spare_bytes(state))
        seen = min(group.seen for group in leaving.groups)
        _append(state, Selection(rows, leaving.leaving(tail), room, seen, leaving.lengths))
    else:
        groups = [group for group in _groups(state, leaving) if _changes(state, group)]
        for selection in _selections(state, tail, groups):
            if len(selection.span):
                _append(state, selection)
    state.routing.forget_plan()
    _examine(state, tail, leaving)
    count = min(leaving.starts) - state.first_in_tail
    state.depart(leaving.starts, leaving.num_departed)
    if state.observed.pending is not None:
        state.observed.settle()
    state.observed.drop(count)
    if tail["keys"].device.type == "cpu":
        page = tail.narrow(0, count)
        state.step.add_sealed_bytes(page["keys"].nbytes + page["values"].nbytes)
    return count


def _changes(state: LayerState, group: Departing) -> bool:
    """Return True if tokens of a group leave the tail, or if its token statistics change."""
    return bool(group.count) or state.observed.pending is not None


def _selections(
    state: LayerState, tail: TokenTable, groups: list[Departing]
) -> Iterator[Selection]:
    """Yield what is sealed of `groups`: all that leaves the `tail`, or what the scheduler keeps."""
    if state.settings.scheduler is not None:
        yield from select_tokens(state, tail, groups, state.settings.scheduler)
        return
    for group in groups:
        yield Selection(group.rows, group.leaving(tail), Room(spare_bytes(state)), group.seen)


def _append(state: LayerState, chosen: Selection) -> None:
    """Append a selection to the pages, with the newest queries if the compressor uses any."""
    newest = min(state.compressor.observed_queries, chosen.seen)
    queries = _scaled_queries(state, chosen.rows, newest)
    parts = chosen.span, chosen.rows, state.tail.batch, queries, chosen.room, chosen.lengths
    with naming(state):
        state.pages.append(*parts)


def _scaled_queries(state: LayerState, rows: list[int], newest: int) -> Tensor | None:
    """Return queries [R, H, Q, D] whose products with keys are the logits of attention."""
    queries = state.observed.of_rows(rows, newest)
    return None if queries is None else queries.flatten(2, 3) * state.scale


def _examine(state: LayerState, tail: TokenTable, leaving: Departure) -> None:
    """Let guard and probe compare tokens that leave the `tail` with pages made of them.

    Tokens evicted at once are compared, too; tokens sealed earlier are not, as their originals are
    gone.
    """
    groups = [group for group in leaving.groups if group.count]
    for group in groups if state.settings.probe else groups[:1]:
        if not (state.settings.probe or state.guard.is_due(state.compressor, group.left)):
            continue
        new = group.leaving(tail)
        queries = _scaled_queries(
            state, group.rows, min(state.compressor.observed_queries, group.seen)
        )
        with naming(state):
            state.guard.check(
                state.compressor, state.pages, new, queries, group.left, state.layer_idx
            )
            if state.settings.probe:
                pages = state.pages.apart(new, queries)
                newest = min(state.probe.observed_queries, group.seen)
                probes = state.observed.of_rows(group.rows, newest)
                assert probes is not None, "they are observed for the probe"
                queries = probes.flatten(2, 3)
                state.probe.measure(new, pages, queries, state.scale, state.latent_rank)


def _groups(state: LayerState, leaving: Departure) -> list[Departing]:
    """Split the groups, for a scheduler, until the rows of each hold equally many sealed tokens.

    With a ragged scheduler and a mixed compressor, each row is a group by itself.
    """
    if state.settings.scheduler is None:
        return leaving.groups
    is_apart = state.settings.traits.is_ragged and state.compressor.is_mixed
    split = []
    for group in leaving.groups:
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(group.rows):
            key = (row,) if is_apart else state.pages.signature(row)
            alike.setdefault(key, []).append(number)
        split += [group.select(numbers) for numbers in alike.values()]
    return split
