"""A forward pass of the decoder: what begins and ends with it in the cache that it writes to."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .fit import unheard
from .layer import PagedLayer
from .model.versions import full_attention_mask, is_tested, unsupported

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
    shared.forget_notes()  # of a forward pass that failed, or of a `crop`
    if not shared.holds_prompts:
        return
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return  # drafted tokens are being verified
    if length > 1:
        shared.holding = True
    elif shared.holding:
        cache.compress()


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
    cache.check_idle()
