"""Steps of a whole cache: begin and end of a forward pass, and sealing without one."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..layer.paged_layer import PagedLayer
from ..layer.step import Change
from ..model.versions import full_attention_mask, is_tested, unsupported
from .checks import check_whole, given_ids
from .paged_cache import PagedCache
from .repetition.repeat import repeat
from .suitability import unheard


def begin_forward(cache: PagedCache, length: int, mask: Any) -> None:
    """Begin a forward pass of `length` tokens; a generated token first releases a held prompt.

    `mask`: the decoder's argument.
    """
    seen = cache.get_seq_length()
    cache.step.forget()  # what a failed forward pass or a `crop` has left
    if cache.settings.holds_prompts and not (cache.reading.is_block or cache.is_drafting):
        if cache.reading.is_prompt(seen, length):
            cache.reading.hold()
        elif cache.reading.is_held:
            compress(cache)
    cache.step.begin(Change(seen, length), full_attention_mask(mask))


def end_forward(cache: PagedCache, ids: Tensor | None) -> None:
    """End a forward pass over the token `ids`; raise unless every attention and gate was heard."""
    cache.step.release()
    cache.finite.send(cache.states)
    for state in cache.states:
        if state.awaits is not None:
            if not is_tested():
                raise RuntimeError(
                    f"{unsupported()}: layer {state.layer_idx} was not heard in a forward pass."
                )
            raise RuntimeError(unheard(cache, state.layer_idx, state.awaits))
    change = cache.step.change
    if change is None or change.has_written:
        cache.log.append(ids)
    elif cache.model is not None and cache.model.training:
        raise RuntimeError(
            "the model has cached nothing: in training mode with gradient checkpointing its layers are "
            "given no cache; call `model.eval()`, or pass none."
        )
    cache.step.end()


def compress(cache: PagedCache) -> None:
    """Seal and evict down to the budget now."""
    check_whole(cache)
    if cache.reading.is_held:
        repeat(cache)
    cache.reading.release()
    with cache.step.sealing(cache.get_seq_length()):
        for layer in cache.layers_to_be:
            if isinstance(layer, PagedLayer):
                layer.compress()
    cache.step.release()
    cache.finite.send(cache.states)


def prompt_length(
    cache: PagedCache, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    """Return the length of the prompt of `generate`, cached tokens included; None = unknown."""
    if kwargs.get("custom_generate") is not None or model.config.is_encoder_decoder:
        return None
    ids, mask = given_ids(args, kwargs), kwargs.get("attention_mask")
    embeds = kwargs.get("inputs_embeds")
    if isinstance(embeds, Tensor):  # embeddings always cover the whole text
        length = embeds.shape[1]
    elif isinstance(ids, Tensor) and ids.dim() == 2:  # ids, or the mask, cover the whole text
        length = max(ids.shape[1], mask.shape[1] if isinstance(mask, Tensor) else 0)
    else:
        return None
    return length if length > cache.get_seq_length() else None
