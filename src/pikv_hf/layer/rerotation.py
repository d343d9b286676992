"""Rerotation: kept keys move to newer positions, closing the gaps that evicted tokens left."""

import torch
from torch import Tensor

from ..model.rotary import Rotary
from ..storage.token_table import TokenTable
from .settings import Settings
from .state import LayerState

# Steps of a rest in half the distance from a number of a key to its neighbour in the dtype.
STEPS = 127


def moves(settings: Settings) -> bool:
    """Return True if kept keys move to close the gaps between them."""
    return "rerotate" in settings.needs.inputs


def with_rest(state: LayerState, span: TokenTable) -> TokenTable:
    """Return `span`, tokens that have not moved yet, with a `rest` of zeros; float32 has no rest.

    `rest` [R, H, T, turning dims] int8 is the part of the keys that their dtype cannot hold.
    Without it, keys that move many times in 16 bits would drift.
    """
    keys, rotary = span["keys"], state.turning
    if keys.dtype == torch.float32:
        return span
    rest = torch.zeros_like(keys[..., rotary.turning], dtype=torch.int8)
    return span.with_columns(TokenTable({"rest": rest}))


def rest_bytes(state: LayerState) -> int:
    """Return the bytes of the `rest` of a token of one KV head."""
    if not moves(state.settings) or state.tail.keys.dtype == torch.float32:
        return 0
    return state.tail.keys[..., state.turning.turning].shape[-1]


def side_by_side(state: LayerState, stays: TokenTable, kept: Tensor, places: int) -> TokenTable:
    """Return `stays`, the tokens at `kept` [R, H, K] of `places` places, moved to close the gaps.

    `kept` ascends, and is -1 behind the last token. The newest token moves to the last place.
    """
    rotary = state.turning
    order = torch.arange(kept.shape[2], device=kept.device)
    is_kept = kept >= 0
    newer = is_kept.sum(-1, keepdim=True) - 1 - order
    dropped = (places - 1 - kept - newer).masked_fill(~is_kept, 0)
    keys = stays["keys"]
    if "rest" not in stays:
        moved = rotary.rotate(keys, torch.zeros_like(dropped), dropped)
        return stays.with_columns(TokenTable({"keys": moved}))
    exact = _exact(keys, stays["rest"], rotary)
    moved = rotary.rotate(exact, torch.zeros_like(dropped), dropped)
    return stays.with_columns(
        TokenTable({"keys": moved.to(keys.dtype), "rest": _rest(moved, keys, rotary)})
    )


def _unit(dtype: torch.dtype) -> float:
    """Return one step of a rest as a fraction of the number that it corrects."""
    return torch.finfo(dtype).eps / 2 / STEPS


def _exact(keys: Tensor, rest: Tensor, rotary: Rotary) -> Tensor:
    """Return float32 keys: the held `keys` with their `rest`."""
    exact = keys.float()
    exact[..., rotary.turning] *= 1 + rest * _unit(keys.dtype)
    return exact


def _rest(exact: Tensor, held: Tensor, rotary: Rotary) -> Tensor:
    """Return the part of float32 keys that the dtype of `held` loses, in steps."""
    exact = exact[..., rotary.turning]
    rounded = exact.to(held.dtype).float()
    steps = torch.where(rounded == 0, 0.0, (exact / rounded - 1) / _unit(held.dtype))
    return steps.round().clamp(-STEPS, STEPS).to(torch.int8)
