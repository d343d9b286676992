"""Refusals of inputs with which transformers would silently misread a cache.

`generate` drops as many first input ids as the cache is long, without comparing them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layer.step import Change
from ..model.versions import CACHE, full_attention_mask
from .paged_cache import PagedCache

_CONTINUE = (
    "to continue it pass the full token ids (cached ones included), or only the new ids with an "
    "attention_mask that covers the cached tokens too; to start anew call `cache.reset()`"
)


def check_generate(
    cache: PagedCache, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse a call of `generate` that would ignore the cache or misread what it holds."""
    check_owner(cache, model)
    check_whole(cache)
    config = kwargs.get("generation_config") or model.generation_config
    name = "cache_implementation"
    implementation = kwargs.get(name, getattr(config, name, None))
    if implementation is not None:
        raise ValueError(
            f"`{name}` is {implementation!r}, with which `generate` would not use the "
            f"PiKVCache in `{CACHE}`: pass only one of the two."
        )
    _check_use_cache(kwargs.get("use_cache", getattr(config, "use_cache", True)))
    ids = given_ids(args, kwargs)
    seen = cache.get_seq_length()
    is_read = isinstance(ids, Tensor) and ids.dim() == 2 and kwargs.get("inputs_embeds") is None
    if seen and is_read and not model.config.is_encoder_decoder:
        _check_continuation(cache, ids, kwargs.get("attention_mask"), seen)


def _check_use_cache(given: Any) -> None:
    """Refuse `use_cache=False`."""
    if given is False:
        raise ValueError(
            f"`use_cache` is False, but `{CACHE}` holds a PiKVCache, which would be filled "
            "all the same: pass use_cache=True, or no cache."
        )


def given_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the token ids among the arguments of `generate`."""
    return args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))


def _check_continuation(cache: PagedCache, ids: Tensor, mask: Tensor | None, seen: int) -> None:
    length = ids.shape[1]
    if mask is not None and mask.shape[1] != length:
        if mask.shape[1] != seen + length:
            raise ValueError(
                f"`attention_mask` has {mask.shape[1]} columns for {length} new ids and a cache of "
                f"{seen} tokens; {_CONTINUE}."
            )
        return
    if length <= seen:
        raise ValueError(
            f"`input_ids` has {length} tokens, but the cache holds {seen} already; {_CONTINUE}."
        )
    if not cache.log.starts(ids):
        raise ValueError(
            f"`input_ids` does not begin with the {seen} tokens that the cache holds; {_CONTINUE}."
        )


def check_forward(cache: PagedCache, model: PreTrainedModel | None, kwargs: dict[str, Any]) -> None:
    """Refuse a forward pass of the decoder whose inputs do not continue the text in the cache."""
    check_owner(cache, model)
    check_whole(cache)
    _check_use_cache(kwargs.get("use_cache"))
    if model is not None:
        _check_training(model, kwargs.get("inputs_embeds"))
    if kwargs.get("output_attentions"):
        raise ValueError(
            "`output_attentions` is True; PiKVCache computes no attention weights: pass False."
        )
    seen = cache.get_seq_length()
    inputs = _new_inputs(kwargs)
    if inputs is not None and cache.rows not in (None, inputs.shape[0]):
        raise ValueError(
            f"the batch has {inputs.shape[0]} rows, but `{CACHE}` holds {cache.rows}: call "
            "`cache.batch_repeat_interleave(n)` before generating n sequences or beams from each "
            "row of a filled cache, or `cache.reset()` for another batch."
        )
    # After the prompt `generate` makes masks, which only grow, and positions itself.
    prompt = cache.reading.prompt_length
    if seen and inputs is not None and (prompt is None or seen < prompt):
        _check_width(kwargs.get("attention_mask"), seen, inputs.shape[1])
        _check_continued(cache, kwargs, inputs.shape[1], seen)


def _check_width(mask: Any, seen: int, length: int) -> None:
    """Refuse a mask that is too short: transformers would pad it and so hide the new tokens."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] < seen + length:
        raise ValueError(
            f"`attention_mask` has {mask.shape[1]} columns for {length} new tokens and a cache of "
            f"{seen}; it must have a column for each of them: {seen + length}."
        )


def _check_training(model: PreTrainedModel, embeds: Any) -> None:
    """Refuse to train through the cache, which holds keys and values without gradients.

    In eval mode a pass with gradients may be inference: then only a backward pass is refused.
    """
    if not torch.is_grad_enabled():
        return
    is_leaf = isinstance(embeds, Tensor) and embeds.is_leaf and embeds.requires_grad
    if is_leaf or (model.training and any(p.requires_grad for p in model.parameters())):
        what = "`inputs_embeds` wants" if is_leaf else "`model` is in training mode and wants"
        raise RuntimeError(
            f"{what} gradients, which do not pass through a PiKVCache: train without a cache, or run "
            "inference within `torch.no_grad()`."
        )


def _check_continued(cache: PagedCache, kwargs: dict[str, Any], length: int, seen: int) -> None:
    """Refuse a mask that shows padding again, or positions that do not follow `seen`.

    Tokens in pages that the mask hides are hidden from the queries of the pass.

    Waits for the device once if a mask or positions are given.
    """
    mask, columns = kwargs.get("attention_mask"), cache.columns
    own = full_attention_mask(mask)
    if own is not None and own.dim() == 4 and own.shape[1] > 1 and cache.is_paged:
        raise ValueError(
            f"`attention_mask` masks each of {own.shape[1]} heads apart, but `{CACHE}` has read {seen} "
            "tokens without such a mask: call `cache.reset()` and give one from the first tokens on, "
            "or a mask for all heads."
        )
    found = columns.differences(mask, seen + length, cache.starts)
    shown, covered, changed = found or (None, None, None)
    first, expected, wrong = _start(kwargs.get("position_ids"), mask, seen, cache.prompt_end)
    is_shown, is_covered, is_changed, is_wrong = _any(shown, covered, changed, wrong)
    if (is_shown or is_changed) and shown is not None and changed is not None:
        columns.refuse(shown, changed)
    if not is_wrong:
        return columns.cover(covered if is_covered else None)
    at = expected if isinstance(expected, int) else expected.tolist()
    raise ValueError(
        f"the new tokens start at position {first.tolist()}, but the cache ends at {at}: "
        f"`{CACHE}` holds {seen} tokens; {_CONTINUE}."
    )


def _any(*faults: Tensor | None) -> list[bool]:
    """Return of each fault whether it is True anywhere, all with one wait for a device."""
    given = [fault.any() for fault in faults if fault is not None]
    if not given:
        return [False] * len(faults)
    found = iter(torch.stack([fault.to(given[-1].device) for fault in given]).tolist())
    return [False if fault is None else next(found) for fault in faults]


def _start(positions: Any, mask: Any, seen: int, prompt_end: int) -> tuple[Any, Any, Tensor | None]:
    """Return the first new position, the expected one without padding, and where they differ.

    One value for each row, or None three times if positions are unknown. Rows whose prompt ends in
    padding never differ: `generate` counts on from a last position, which they do not have.
    """
    if not (isinstance(positions, Tensor) and positions.dim() == 2):
        return None, None, None
    first = positions[:, 0]
    if mask is None:
        return first, seen, first != seen
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > seen:
        expected = mask[:, :seen].sum(-1)
        counts = mask[:, seen].bool() & mask[:, prompt_end - 1].bool()
        return first, expected, (first != expected) & counts
    return None, None, None


def check_whole(cache: PagedCache) -> None:
    """Refuse a cache whose last pass or sealing has failed half-way, or has sealed NaN."""
    cache.finite.read()
    change = cache.step.change
    if change is not None and change.is_half_done:
        raise RuntimeError(half_done(change, can_be_cropped=not change.has_sealed))


def half_done(failed: Change, *, can_be_cropped: bool) -> str:
    """Return a message: what has failed, and what the user can call now."""
    if not failed.length:
        return (
            "sealing has failed, so that some layers of this PiKVCache hold pages of tokens and others "
            "do not: call `cache.reset()`."
        )
    plural = "s" if failed.length > 1 else ""
    can = f"call `cache.crop(-{failed.length})` to take it back, or `cache.reset()`"
    return (
        f"the last forward pass, of {failed.length} token{plural}, has failed, and some layers of this "
        f"PiKVCache are ahead of others: {can if can_be_cropped else 'call `cache.reset()`'}."
    )


def check_owner(cache: PagedCache, model: PreTrainedModel | None) -> None:
    """Refuse a cache that is attached to another model, or to none."""
    owner = cache.model
    if cache.binding is not None and owner is not model:
        name = "a model that is gone" if owner is None else f"another {type(owner).__name__}"
        raise ValueError(
            f"`{CACHE}` is a PiKVCache attached to {name}: make one for this model with "
            "`PiKVCache(model)`."
        )


def num_new_tokens(inputs: dict[str, Any]) -> int:
    """Return the number of tokens in the inputs of a forward pass."""
    new = _new_inputs(inputs)
    return 0 if new is None else new.shape[1]


def _new_inputs(inputs: dict[str, Any]) -> Tensor | None:
    """Return the embeddings or token ids in the inputs of a forward pass."""
    embeds = inputs.get("inputs_embeds")
    return inputs.get("input_ids") if embeds is None else embeds
