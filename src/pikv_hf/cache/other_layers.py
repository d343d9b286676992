"""Operations on the cache layers of transformers that a PiKVCache holds beside paged layers."""

from typing import Any

from ..layer.paged_layer import PagedLayer
from ..model.versions import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from ..storage.memory import own, tensors_in


def reads_full_mask(layer: Any) -> bool:
    """Return whether a layer is not paged, but reads the mask of paged layers."""
    return (
        isinstance(layer, CacheLayerMixin)
        and not isinstance(layer, PagedLayer)
        and not getattr(layer, "is_sliding", False)
    )


def release_prompt(layer: Any) -> None:
    """Copy the window of a sliding layer if it is a view of a whole prompt, to free the prompt.

    A decode step leaves a view of a tensor that is one token longer, which is not worth a copy.
    """
    if not getattr(layer, "is_sliding", False) or getattr(layer, "record_past", False):
        return
    window = layer.sliding_window
    for name in ("keys", "values"):
        states = getattr(layer, name)
        if states.untyped_storage().nbytes() * (window - 1) > states.nbytes * window:
            setattr(layer, name, states.clone())


def release_cropped(layer: Any) -> None:
    """Copy states of bounded size that are views after a `crop`, to free the larger tensors."""
    if getattr(layer, "is_sliding", False) and layer.is_initialized:
        layer.keys, layer.values = own(layer.keys), own(layer.values)
    states = getattr(layer, "conv_states", {})
    states.update({idx: own(state) for idx, state in states.items() if state is not None})


def holds_nothing(layer: Any) -> bool:
    """Return whether a layer has no tensors: its block caches nothing, or was not run yet."""
    return not any(True for _ in tensors_in(vars(layer)))


def can_be_undone(layer: Any) -> bool:
    """Return whether a layer that is not paged can undo what a failed forward pass has written."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return holds_nothing(layer)
    return layer.keys.shape[-2] == layer.values.shape[-2] == layer.get_seq_length()
