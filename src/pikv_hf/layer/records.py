"""Records: token statistics that the queries of a layer update, for its scheduler.

To settle queries is to add them to the records of all tokens.
Shapes: R rows, H KV heads, G query heads of each, m queries, T tokens, c numbers of a record.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedulers.attention_mass import attention_weights
from ..storage.memory import is_writable, on_device
from ..storage.token_table import TokenTable
from ..storage.uniform_pages import UniformPages
from .autocast import without_autocast
from .departure import Departing, open_places
from .state import LayerState


def settled(state: LayerState, rows: list[int], sealed: TokenTable | None) -> TokenTable | None:
    """Add pending queries to all records of `rows`; return `sealed`, all sealed tokens, with them.

    Records of tail tokens are updated in place.
    """
    tail, observed = state.tail, state.observed
    queries = observed.pending
    if queries is None:
        return sealed
    index = on_device(tuple(rows), queries.device)
    if observed.counted is None:
        opened = _opened(state).select_rows(index)
        tokens = opened if sealed is None else sealed.followed_by(opened)
        record = recorded(state, rows, tokens, queries[index])
    else:
        record = observed.counted[index]
    before = record.shape[2] - tail.length
    tail_record(state)[index] = record[:, :, before:]
    if sealed is None:
        return None
    return sealed.with_columns(TokenTable({"record": record[:, :, :before]}))


def _opened(state: LayerState) -> TokenTable:
    """Return keys, records and positions of the tail, and `valid`, True at tail tokens."""
    tail = state.tail
    device = tail.keys.device
    valid = open_places(state)
    if valid is None:
        valid = torch.ones(tail.batch, tail.length, dtype=torch.bool)
    positions = torch.arange(state.first_in_tail, state.num_seen, device=device)[None, None]
    opened = TokenTable(
        {"keys": tail.view()[0], "record": tail_record(state), "positions": positions}
    )
    return opened.with_columns(TokenTable({"valid": valid.to(device)[:, None]}))


def with_record(state: LayerState, group: Departing, new: TokenTable) -> TokenTable:
    """Return `new`, the tokens of `group` that leave the tail, with their records."""
    return new.with_columns(group.leaving(TokenTable({"record": tail_record(state)})))


@without_autocast
def settle_held(state: LayerState) -> None:
    """Settle the pending queries of a layer that seals no token now: they take much memory."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in range(state.tail.batch):
        groups.setdefault(state.pages.signature(row), []).append(row)
    for rows in groups.values():
        (taken,) = state.pages.take([rows], with_values=False)
        sealed = settled(state, rows, taken)
        if sealed is not None:
            tokens = sealed.for_rows(len(rows)).valid_first()
            state.pages.append(tokens, rows, state.tail.batch)
    state.observed.settle()


def tail_record(state: LayerState) -> Tensor:
    """Return the records [B, H, n, c] of the tail tokens; new tokens start with zeros."""
    observed, tail = state.observed, state.tail
    shape = *tail.keys.shape[:2], tail.length, observed.numbers
    record = observed.record
    if record is None:
        record = tail.keys.new_zeros(shape, dtype=torch.float32)
    missing = tail.length - record.shape[2]
    if missing:
        record = F.pad(record, (0, 0, 0, missing))
    observed.set_record(record)
    return record


def recorded(state: LayerState, rows: list[int], tokens: TokenTable, queries: Tensor) -> Tensor:
    """Return the records [R, H, T, c] of `tokens` after the newest `queries` [R, H, G, m, D].

    Attention weights are computed block by block, to save memory.
    """
    statistics, seen = state.settings.needs.statistics, state.num_seen
    assert statistics is not None, "records are of a scheduler"
    record, keys = tokens["record"], tokens["keys"]
    newest = tokens["positions"].to(keys.device).expand(record.shape[:3])
    if "valid" in tokens:
        newest = newest.masked_fill(~tokens["valid"].to(keys.device), seen)
    for weights, query_positions in attention_weights(queries, keys, newest, seen, state.scale):
        at = state.columns.numbered(rows, query_positions[None])
        record = statistics.updated(record, weights, at)
    return record


def write_counted(state: LayerState) -> bool:
    """Write the counted records in place and return True; return False if that is not possible."""
    observed, slabs = state.observed, state.pages.slabs
    counted = observed.counted
    if counted is None:
        return False
    # Pages that another cache shares, or that inference mode made, are not written to.
    if any(slab.is_forked or not is_writable(slab.meta["record"]) for slab in slabs):
        return False
    start = 0
    for slab in slabs:
        assert isinstance(slab, UniformPages), "tokens of pools are not counted"
        record = slab.meta["record"]
        record[:, :, : slab.length] = counted[:, :, start : start + slab.length]
        start += slab.length
    observed.set_record(counted[:, :, start:].clone())
    return True
