"""What a cache holds beside its paged layers: the part of a budget in bytes that is not theirs."""

from typing import TYPE_CHECKING, Any

from .memory import storage_bytes, tensors_in
from .model.versions import DynamicLayer
from .tail import roomy
from .token_log import log_bytes

if TYPE_CHECKING:
    from .layer import PagedLayer


def bytes_beside(layer: "PagedLayer") -> int:
    """Bytes that are not for paged layers, as many as there can be when `layer` seals again.

    They are of layers that are not paged, sliding ones with their whole window, and of token ids.
    """
    if layer.is_first:  # other layers are written to between this one and the next
        return _counted(layer)
    key = (layer.seen, layer.tail.batch)
    return layer.shared.remember("beside", key, lambda: _counted(layer))


def _counted(layer: "PagedLayer") -> int:
    shared, batch = layer.shared, layer.tail.batch
    end = layer.seen + shared.page_size
    total = log_bytes(batch, end, shared.most_ids) + storage_bytes(shared.padding.tensors())
    for tail in shared.unpaged.values():
        room = tail.keys.shape[2]
        held = storage_bytes(tail.tensors())
        total += held if end <= room else held * roomy(end, end, tail.token_bytes) // room
    sizes = [_grown(other, end) for other in shared.others]
    total += sum(sizes)
    if layer.is_first:  # what is not yet written to will be like the others of its kind
        both = list(zip(shared.others, sizes, strict=True))
        known = {_kind(other): nbytes for other, nbytes in both if nbytes}
        empty = (other for other, nbytes in both if not nbytes)
        total += sum(known.get(_kind(o)) or _guessed(o, layer, end) for o in empty)
    return total


def _kind(other: Any) -> tuple[type, Any]:
    return type(other), getattr(other, "sliding_window", None)


def _grown(other: Any, end: int) -> int:
    """Bytes of a layer, or of a list of states, at `end` tokens; 0 if it was not written to."""
    if not isinstance(other, DynamicLayer):  # its states do not grow
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


def _guessed(other: Any, layer: "PagedLayer", end: int) -> int:
    """Bytes of a layer of which none has been written to: with the heads of the paged `layer`.

    States are taken to be as large as its open tokens.
    """
    tail, shared = layer.tail, layer.shared
    numbers = tail.batch * tail.keys.shape[1] * (tail.keys.shape[3] + tail.values.shape[3])
    tokens = shared.window + shared.page_size
    if isinstance(other, DynamicLayer):
        tokens = other.sliding_window if other.is_sliding else end
    return tokens * numbers * tail.keys.element_size()
