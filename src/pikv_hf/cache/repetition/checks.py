"""Refusals by schedulers that let the model repeat a text."""

from typing import Any

from transformers import PreTrainedModel

from ..paged_cache import PagedCache


def check_repetition(how: Any, model: PreTrainedModel, native: type | None) -> None:
    """Refuse a `model` that cannot repeat texts as `how` says; None = nothing is repeated.

    Raises:
        ValueError: tokens cannot be removed again, or the prompt exceeds the model's vocabulary.
    """
    if how is None:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder or native is not None:
        kind = "an encoder" if native is None else f"a cache class of its own, {native.__name__}"
        raise ValueError(f"`scheduler` is {how}, but {name} has {kind}: it cannot repeat a text.")
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if max(how.prompt_ids, default=0) >= size:
        raise ValueError(f"`prompt_ids` of {how} exceeds the {size} tokens of {name}.")


def check_held(cache: PagedCache, kwargs: dict[str, Any], length: int) -> None:
    """Refuse to read `length` tokens that cannot be repeated, if the scheduler needs that.

    Only the first text is repeated: later ones, such as questions about it, need not be held.

    Raises:
        ValueError: the first text is not held, or token ids are unknown.
    """
    how = cache.settings.needs.repetition
    if how is None:
        return
    if kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            f"the model was given embeddings, but `scheduler` is {how}, which repeats token ids: pass "
            "`input_ids`, to a model of text alone."
        )
    if cache.get_seq_length():
        return
    if cache.is_drafting:
        raise ValueError(
            f"a prompt was given together with drafted tokens to a cache with {how}: let the model "
            "read the prompt first, within `with cache.holding():`."
        )
    if length > 1 and not (cache.reading.is_held or cache.settings.holds_prompts):
        raise ValueError(
            f"a text of {length} tokens was given to a cache with {how}, which scores what is held "
            "back: read it within `with cache.holding():`, or make the cache with hold_prompt=True."
        )
