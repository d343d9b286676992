"""Why the keys of a layer cannot be read by our attention."""

from typing import Any

from torch import Tensor

from ..layer.state import LayerState

# Tensors that a model may pass besides the mask without changing what is attended to.
HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}
# Logits of a key without a value, by the names that models give them.
SINKS = ("s_aux", "sinks")


def unpaged_reason(
    state: LayerState, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why this layer's keys cannot be read by us, or None; judged on its first tokens.

    We read what `update` was given. A model that changes it on the way to attention, or adds
    something else to the scores, keeps its own attention and gets all keys from `update`.
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
