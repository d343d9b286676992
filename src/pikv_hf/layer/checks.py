"""Checks of the arguments of a paged layer."""

import contextlib
from collections.abc import Generator

from torch import Tensor

from .state import LayerState


def check_update(state: LayerState, keys: Tensor, values: Tensor) -> None:
    """Refuse new `keys` [B, H, T, Dk] and `values` that cannot follow the layer's tokens.

    Raises:
        RuntimeError: the last tokens still wait for their attention or their experts.
        ValueError: heads, dims, dtype or batch differ from the tokens held.
    """
    if state.awaits is not None:
        raise RuntimeError(
            f"layer {state.layer_idx}: the model cached new tokens before PiKVCache saw the "
            f"{state.awaits} of the last ones; the model's forward was changed after the cache "
            "was attached, or was interrupted (then call `cache.reset()`)."
        )
    got = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.shape[0])
    if state.num_seen and got != (*state.geometry, state.tail.batch):
        raise ValueError(
            f"layer {state.layer_idx}: keys and values of (heads, key dim, value dim, dtype, batch) "
            f"= {got} were given to a cache of {(*state.geometry, state.tail.batch)}; use a new "
            "PiKVCache, or `cache.reset()`, for another batch."
        )


def check_crop(state: LayerState, tokens_to_remove: int) -> None:
    """Raise ValueError if the layer cannot be cropped by `tokens_to_remove`."""
    if tokens_to_remove > 0:
        raise ValueError(
            f"`tokens_to_remove` is {tokens_to_remove}; it must be 0 or the negative number of "
            "tokens to remove."
        )
    if -tokens_to_remove > state.num_seen:
        raise ValueError(
            f"`tokens_to_remove` is {tokens_to_remove}, but the cache has seen {state.num_seen} "
            "tokens."
        )
    tail = state.num_seen - max(state.starts) if state.is_written else 0
    if -tokens_to_remove > tail and state.settings.scheduler is not None:
        raise ValueError(
            f"`tokens_to_remove` is {tokens_to_remove}, but only the newest {tail} tokens can be "
            "removed from a cache whose scheduler may have evicted older tokens."
        )


@contextlib.contextmanager
def naming(state: LayerState) -> Generator[None, None, None]:
    """Add the layer's index to a ValueError of the compressor."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {state.layer_idx}: {error}") from error
