"""Checks of the arguments of a paged layer."""

import contextlib
from collections.abc import Generator

import torch
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


def labels_of(
    state: LayerState, keys: Tensor, expert_ids: Tensor | None, expert_weights: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return experts and weights [B, T, k] of new `keys` [B, H, T, D]; None if no method needs any.

    Raises:
        ValueError: they do not fit the tokens, the labels before them, or the layer's gate.
    """
    if expert_ids is None or not state.settings.needs_labels:
        if expert_weights is not None and expert_ids is None:
            raise ValueError("`expert_weights` were given without `expert_ids`.")
        return None
    where, shape = f"layer {state.layer_idx}: `expert_ids` of shape", tuple(expert_ids.shape)
    lead = keys.shape[0], keys.shape[2]
    if not state.facts.has_gate:
        raise ValueError(
            f"{where} {shape} were given to a layer without a gate, which has no experts."
        )
    held = state.tail.labels if state.is_written else None
    width = "k" if held is None else held["experts"].shape[-1]
    if len(shape) != 3 or shape[:2] != lead or not shape[2] or width not in ("k", shape[2]):
        raise ValueError(
            f"{where} {shape} were given; they must be (batch, new tokens, k) = {(*lead, width)}."
        )
    if expert_ids.is_floating_point() or expert_ids.dtype == torch.bool:
        raise ValueError(f"{where} {shape} are {expert_ids.dtype}; they must be whole numbers.")
    if expert_ids.device.type == "cpu" and state.facts.num_experts is not None:
        least, most = (int(t) for t in expert_ids.aminmax())
        if least < 0 or most >= state.facts.num_experts:
            raise ValueError(
                f"`expert_ids` are from {least} to {most}, but layer {state.layer_idx} has "
                f"{state.facts.num_experts} experts."
            )
    if expert_weights is None:
        expert_weights = torch.ones_like(expert_ids, dtype=keys.dtype)
    elif expert_weights.shape != expert_ids.shape:
        raise ValueError(
            f"`expert_weights` of shape {tuple(expert_weights.shape)} were given; they must have the "
            f"shape of `expert_ids`, {shape}."
        )
    return expert_ids, expert_weights.detach()


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
