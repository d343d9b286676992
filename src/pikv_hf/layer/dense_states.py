"""Keys and values of a paged layer as one tensor each, as transformers' caches hold them."""

from typing import Any

import torch
from torch import Tensor

from ..model.versions import DynamicLayer
from .autocast import without_autocast
from .state import LayerState


class DenseStates(DynamicLayer):
    """A layer that makes its dense keys and values anew whenever they are read."""

    state: LayerState

    @property
    def keys(self) -> Tensor | None:
        return self.states()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        _check_none("keys", keys)

    @property
    def values(self) -> Tensor | None:
        return self.states()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        _check_none("values", values)

    def states(self) -> tuple[Tensor | None, Tensor | None]:
        """Return copies of keys and values [B, H, T, D] as `update` got them, zero at padding.

        Raises:
            RuntimeError: the scheduler may have evicted some tokens.
        """
        if not self.state.is_written:
            return None, None
        if self.state.settings.scheduler is not None:
            raise RuntimeError("keys and values of a cache that drops tokens cannot be listed.")
        return dense_states(self.state)


def _check_none(name: str, value: Any) -> None:
    """Raise AttributeError unless `value` is None, which transformers' layers begin with."""
    if value is not None:
        raise AttributeError(
            f"`{name}` of a paged layer cannot be set: they are held as a tail and pages, which "
            "`update`, `crop` and `reset` change."
        )


@without_autocast
def dense_states(state: LayerState) -> tuple[Tensor, Tensor]:
    """Return copies of keys and values [B, H, T, D] of all tokens seen, zero at padding."""
    full = []
    for name, tail in zip(("keys", "values"), state.tail.view(), strict=True):
        states = tail.new_zeros(*tail.shape[:2], state.num_seen, tail.shape[3])
        states[:, :, state.first_in_tail :] = tail
        for row in range(state.tail.batch):
            for span in state.pages.spans([row]):
                columns = span["positions"][0].long().to(states.device)
                heads = torch.arange(states.shape[1], device=states.device)[:, None]
                states[row, heads, columns] = span[name][0]
        full.append(states)
    return given(full[0], full[1], state.latent_rank)


def given(keys: Tensor, values: Tensor, latent_rank: int | None) -> tuple[Tensor, Tensor]:
    """Return stored keys and values as `update` got them: latents apart from their rotary keys."""
    if latent_rank is None:
        return keys, values
    return keys[..., :latent_rank], keys[..., latent_rank:]
