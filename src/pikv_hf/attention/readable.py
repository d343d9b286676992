"""Reasons to leave a layer to the attention function of its model."""

from typing import Any

from torch import Tensor

from ..layer.state import LayerState

# Tensors that a model may pass besides the mask without changing the result of attention.
HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}
# Names that models give to the logits of a key without a value.
SINKS = ("s_aux", "sinks")


def unpaged_reason(state: LayerState, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Return why pikv attention cannot serve this layer, or None; called with its first tokens.

    Pikv attention reads the keys given to `update`. A layer that changes them before attention, or
    changes the scores, keeps the model's attention and gets all keys from `update`.
    """
    known = {*HARMLESS, *SINKS}
    foreign = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in known]
    if foreign:
        return f"the model passes `{foreign[0]}` to its attention"
    if kwargs.get("softcap") is not None:
        return "the model caps its attention logits"
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        return "the model masks each head apart"
    if state.latent_rank is not None:
        return None
    held = state.tail.keys
    if key.shape != held.shape or key.data_ptr() != held.data_ptr():
        return "the model changes the keys between cache and attention"
    return None
