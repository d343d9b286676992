"""Removal of the newest tokens: from all layers of a cache, or from none."""

import copy
from typing import Any

from ..layer.checks import check_crop
from ..layer.paged_layer import PagedLayer
from ..layer.step import Change
from .checks import half_done
from .other_layers import can_be_undone, holds_nothing, release_cropped
from .paged_cache import PagedCache


def crop(cache: PagedCache, tokens_to_remove: int) -> None:
    """Remove the newest `-tokens_to_remove` tokens, also tokens of a failed forward pass.

    Raises:
        ValueError, RuntimeError: a layer cannot remove them; no layer has changed.
    """
    failed = cache.step.change
    amounts: list[int | None] | None
    if failed is not None and failed.is_half_done:
        amounts = _amounts(cache, failed, tokens_to_remove)
        if amounts is None:
            return cache.reset()
    else:
        amounts = [tokens_to_remove] * len(cache.layers)
        if cache.native_class is not None:  # raises its own error
            cache.native_class.crop(cache, tokens_to_remove)
    parts = [(x, n) for x, n in zip(cache.layers, amounts, strict=True) if n is not None]
    # Paged layers first: their errors name the argument.
    for layer, amount in sorted(parts, key=lambda part: not isinstance(part[0], PagedLayer)):
        _check_layer(layer, amount)
    for layer, amount in parts:
        layer.crop(amount)
        if not isinstance(layer, PagedLayer):
            release_cropped(layer)
    length = cache.get_seq_length()
    cache.log.crop(length)
    cache.columns.crop(length)
    with cache.step.sealing(length):
        for layer in cache.layers:  # once all layers are cropped
            if isinstance(layer, PagedLayer):
                layer.seal_verified()
    cache.step.forget()


def _check_layer(layer: Any, amount: int) -> None:
    """Raise what `layer.crop(amount)` would raise, while no layer has been cropped yet."""
    if isinstance(layer, PagedLayer):
        return check_crop(layer.state, amount)
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict | list):
            setattr(twin, name, copy.copy(value))
    twin.crop(amount)


def _amounts(cache: PagedCache, failed: Change, tokens_to_remove: int) -> list[int | None] | None:
    """Return by how many tokens to crop each layer after a forward pass that failed half-way.

    A layer with nothing to remove has None. Returns None if no token would be left.

    Raises:
        ValueError: some tokens of the failed pass would be left.
        RuntimeError: the pass has made a change that cannot be undone.
    """
    if tokens_to_remove > -failed.length:
        raise ValueError(
            f"`tokens_to_remove` is {tokens_to_remove}, but the last forward pass has failed and its "
            f"{failed.length} tokens must go: it must be {-failed.length} or less."
        )
    left = failed.seen + failed.length + tokens_to_remove
    if left == 0:
        return None
    others = [layer for layer in cache.layers if not isinstance(layer, PagedLayer)]
    can_be = cache.native_class is None and all(map(can_be_undone, others))
    if left < 0 or failed.has_sealed or not can_be:
        raise RuntimeError(half_done(failed, can_be_cropped=False))
    return [min(left - _usable_length(layer, failed), 0) or None for layer in cache.layers]


def _usable_length(layer: Any, failed: Change) -> int:
    """Drop the tokens of a layer that no attention has read, and return how many it then holds."""
    if not isinstance(layer, PagedLayer):
        return 0 if holds_nothing(layer) else layer.get_seq_length()
    if layer.is_initialized:
        layer.state.drop_unread(failed.seen)
    return layer.state.num_seen
