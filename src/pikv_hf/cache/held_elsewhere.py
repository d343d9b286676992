"""The layers of a cache as a paged layer sees them, and the bytes that are not for its pages."""

from typing import Any

from ..layer.state import LayerState, Neighbours
from ..model.versions import DynamicLayer
from ..storage.memory import storage_bytes, tensors_in
from ..storage.tail import roomy
from .other_layers import reads_full_mask
from .token_log import log_bytes, num_kept_ids


class HeldElsewhere(Neighbours):
    """All layers of a cache: the states of paged layers (`paged`), and `others`.

    `others` are layers of transformers, and lists of states that a model's own cache class has.
    """

    def __init__(self) -> None:
        self.paged: list[LayerState] = []
        self.others: list[Any] = []

    @property
    def unpaged(self) -> list[LayerState]:
        """States of layers that hold tokens and turned out to need the model's own attention."""
        return [s for s in self.paged if s.unpaged_reason is not None and s.is_written]

    @property
    def num_unpaged(self) -> int:
        return len(self.unpaged)

    @property
    def read_full_mask(self) -> bool:
        is_unpaged = any(state.unpaged_reason is not None for state in self.paged)
        return is_unpaged or any(map(reads_full_mask, self.others))

    def read_ahead(self, paged_index: int) -> None:
        state = self.paged[paged_index % len(self.paged)]
        if state.settings.placement.reads_ahead:
            state.pages.read_ahead()

    def nbytes(self, state: LayerState) -> int:
        if state.is_first:  # other layers grow between this paged layer and the next
            return self._counted(state)
        key = (state.num_seen, state.tail.batch)
        return state.step.remember("elsewhere", key, lambda: self._counted(state))

    def _counted(self, state: LayerState) -> int:
        batch, end = state.tail.batch, state.num_seen + state.settings.page_size
        total = log_bytes(batch, end, num_kept_ids(state.settings))
        total += storage_bytes(state.columns.tensors())
        for tail in (unpaged.tail for unpaged in self.unpaged):
            room = tail.keys.shape[2]
            held = storage_bytes(tail.tensors())
            total += held if end <= room else held * roomy(end, end, tail.token_bytes) // room
        sizes = [_bytes_at(other, end) for other in self.others]
        total += sum(sizes)
        if state.is_first:  # layers not yet written to will be as large as others of their kind
            sized = list(zip(self.others, sizes, strict=True))
            known = {_kind(other): nbytes for other, nbytes in sized if nbytes}
            empty = (other for other, nbytes in sized if not nbytes)
            total += sum(known.get(_kind(o)) or _guessed_bytes(o, state, end) for o in empty)
        return total


def _kind(other: Any) -> tuple[type, Any]:
    return type(other), getattr(other, "sliding_window", None)


def _bytes_at(other: Any, end: int) -> int:
    """Return the bytes of a layer, or list of states, at `end` tokens; 0 if not written to."""
    if not isinstance(other, DynamicLayer):  # states do not grow
        return storage_bytes(tensors_in(other if isinstance(other, list) else vars(other)))
    if not other.is_initialized or not other.keys.numel():
        return 0
    held = storage_bytes(tensors_in(vars(other)))
    if other.is_sliding:
        tokens = other.keys.shape[2]
        missing = max(other.sliding_window - tokens, 0)
        return held + missing * (other.keys.nbytes + other.values.nbytes) // tokens
    tokens = other.get_seq_length()
    return held * max(end, tokens) // tokens


def _guessed_bytes(other: Any, state: LayerState, end: int) -> int:
    """Estimate the bytes of an unwritten layer, with the heads and dims of the paged layer `state`.

    A layer of states (linear attention) is assumed to be as large as the tail of that layer.
    """
    tail, settings = state.tail, state.settings
    numbers = tail.batch * tail.keys.shape[1] * (tail.keys.shape[3] + tail.values.shape[3])
    tokens = settings.window + settings.page_size
    if isinstance(other, DynamicLayer):
        tokens = other.sliding_window if other.is_sliding else end
    return tokens * numbers * tail.keys.element_size()
