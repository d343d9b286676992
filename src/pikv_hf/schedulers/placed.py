"""What a scheduler can be told beyond `Tokens`, to compare tokens at other places."""

from dataclasses import dataclass

from torch import Tensor

from ..rotary import Rotary
from .base import Tokens


@dataclass(frozen=True)
class PlacedTokens(Tokens):
    """Candidates as a cache gives them to a scheduler.

    `open_values` [R, H, n, Dv] belong to `open_keys`. Where keys are latents, `latent_rank` of their
    dims are the value, too. `rotary`, for a scheduler that `needs` it, is how the layer's keys and
    queries turn with their position; a difference of columns is one of positions.
    """

    open_values: Tensor | None = None
    latent_rank: int | None = None
    rotary: Rotary | None = None
