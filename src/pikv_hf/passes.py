"""A forward pass of the decoder: what begins and ends with it in the cache that it writes to."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .fit import unheard
from .layer import PagedLayer
from .model.versions import full_attention_mask, is_tested, unsupported
from .shared import Change

if TYPE_CHECKING:
    from .attached import AttachedCache


def begin_forward(cache: "AttachedCache", length: int, mask: Any) -> None:
    """A forward pass of `length` tokens begins: a prompt that was held back ends at 1.

    `mask` as the decoder is given it.
    """
    cache.use_forward()
    shared = cache.shared
    mask = full_attention_mask(mask)
    shared.has_own_mask = mask is not None and mask.dim() == 4
    shared.memo.clear()  # of a forward pass that failed
    shared.forget_notes()  # of one that failed, or of a `crop`
    is_drafting = any(getattr(layer, "record_past", False) for layer in cache.layers)
    if shared.holds_prompts and not is_drafting:
        if length > 1:
            shared.holding = True
        elif shared.holding:
            cache.compress()
    shared.change = Change(cache.get_seq_length(), length)


def end_forward(cache: "AttachedCache", ids: Tensor | None) -> None:
    """A forward pass of the token `ids` has ended: was every attention and gate heard?"""
    cache.shared.end_forward()
    for layer in cache.layers:
        if isinstance(layer, PagedLayer) and layer.awaits is not None:
            if not is_tested():
                raise RuntimeError(
                    f"{unsupported()}: layer {layer.layer_idx} was not heard in a forward pass."
                )
            raise RuntimeError(unheard(cache, layer.layer_idx, layer.awaits))
    cache.log.append(ids)
    cache.shared.change = None
    cache.check_idle()
