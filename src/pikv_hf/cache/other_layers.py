"""Transformers' own cache classes and layers, where PiKVCache stands beside them."""

from typing import Any

from ..layer.paged_layer import PagedLayer
from ..model.versions import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from ..storage.memory import own, tensors_in


def reads_full_mask(layer: Any) -> bool:
    """Whether a layer that is not paged shares the mask of the paged ones."""
    return (
        isinstance(layer, CacheLayerMixin)
        and not isinstance(layer, PagedLayer)
        and not getattr(layer, "is_sliding", False)
    )


def release_prompt(layer: Any) -> None:
    """A sliding layer keeps its window as a view of the whole prompt: keep the window alone.

    Not of one token, which every decode step leaves behind the view.
    """
    if not getattr(layer, "is_sliding", False) or getattr(layer, "record_past", False):
        return
    window = layer.sliding_window
    for name in ("keys", "values"):
        states = getattr(layer, name)
        if states.untyped_storage().nbytes() * (window - 1) > states.nbytes * window:
            setattr(layer, name, states.clone())


def release_cropped(layer: Any) -> None:
    """A layer of bounded size keeps it as a view of more after a `crop`: keep what is left alone."""
    if getattr(layer, "is_sliding", False) and layer.is_initialized:
        layer.keys, layer.values = own(layer.keys), own(layer.values)
    states = getattr(layer, "conv_states", {})
    states.update({idx: own(state) for idx, state in states.items() if state is not None})


def holds_nothing(layer: Any) -> bool:
    """Whether it is of a block without a state, or was not written to."""
    return not any(True for _ in tensors_in(vars(layer)))


def can_be_undone(layer: Any) -> bool:
    """Whether a layer that is not paged can forget what a failed forward pass may have written."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return holds_nothing(layer)
    return layer.keys.shape[-2] == layer.values.shape[-2] == layer.get_seq_length()
