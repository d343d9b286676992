"""A forward pass of the decoder: what begins and ends with it in the cache that it writes to."""

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import given_ids
from .fit import unheard
from .layer import PagedLayer
from .model.versions import full_attention_mask, is_tested, unsupported
from .shared import Change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .attached import AttachedCache


def begin_forward(cache: "AttachedCache", length: int, mask: Any) -> None:
    """A forward pass of `length` tokens begins; a generated one ends a prompt that was held back.

    `mask` as the decoder is given it.
    """
    cache.use_forward()
    shared = cache.shared
    mask = full_attention_mask(mask)
    shared.has_own_mask = mask is not None and mask.dim() == 4
    shared.memo.clear()  # of a forward pass that failed
    shared.forget_notes()  # of one that failed, or of a `crop`
    seen = cache.get_seq_length()
    if shared.holds_prompts and not (shared.in_block or is_drafting(cache)):
        if shared.is_prompt(seen, length):
            shared.holding = True
        elif shared.holding:
            cache.compress()
    shared.change = Change(seen, length)


def is_drafting(cache: "AttachedCache") -> bool:
    """Whether drafted tokens are being verified, which may be taken back."""
    return any(getattr(layer, "record_past", False) for layer in cache.layers)


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
    change = cache.shared.change
    if change is None or change.has_written:
        cache.log.append(ids)
    elif cache.model is not None and cache.model.training:
        raise RuntimeError(
            "the model has cached nothing: in training mode with gradient checkpointing its layers are "
            "given no cache; call `model.eval()`, or pass none."
        )
    cache.shared.change = None
    cache.check_idle()


@contextlib.contextmanager
def reading_prompt(cache: "AttachedCache", length: int | None) -> Generator[None, None, None]:
    """Within the block, a call of `generate`, the first `length` tokens of the text are its prompt."""
    outer, cache.shared.prompt_length = cache.shared.prompt_length, length
    try:
        yield
    finally:
        cache.shared.prompt_length = outer


def prompt_length(
    cache: "AttachedCache", model: "PreTrainedModel", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    """Tokens of the text, cached ones included, before `generate` makes its first; None = unknown."""
    if kwargs.get("custom_generate") is not None or model.config.is_encoder_decoder:
        return None
    ids, mask = given_ids(args, kwargs), kwargs.get("attention_mask")
    embeds = kwargs.get("inputs_embeds")
    if isinstance(embeds, Tensor):  # always of the whole text
        length = embeds.shape[1]
    elif isinstance(ids, Tensor) and ids.dim() == 2:  # of the whole text, or the mask is
        length = max(ids.shape[1], mask.shape[1] if isinstance(mask, Tensor) else 0)
    else:
        return None
    return length if length > cache.get_seq_length() else None
