"""Keys and values of a paged layer as one tensor each, as transformers' caches hold them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .model.versions import DynamicLayer
from .shared import Shared
from .tail import Tail

if TYPE_CHECKING:
    from .layer import PagedLayer


class Listed(DynamicLayer):
    """A layer that holds no tensor of all its keys, and makes one whenever it is asked for."""

    shared: Shared
    _tail: Tail | None

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
        """Keys and values [B, H, T, D] as `update` was given them, zero at padding: a copy.

        Raises:
            RuntimeError: the scheduler may have dropped some.
        """
        if self._tail is None:
            return None, None
        if self.shared.scheduler is not None:
            raise RuntimeError("keys and values of a cache that drops tokens cannot be listed.")
        return listed_states(self)  # ty: ignore[invalid-argument-type]


def _check_none(name: str, value: Any) -> None:
    """None is what transformers' layers begin with."""
    if value is not None:
        raise AttributeError(
            f"`{name}` of a paged layer cannot be set: they are held as a tail and pages, which "
            "`update`, `crop` and `reset` change."
        )


@without_autocast
def listed_states(layer: "PagedLayer") -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D] of all tokens seen, zero at padding: a copy."""
    sealed = layer.seen - layer.tail.length
    full = []
    for name, tail in zip(("keys", "values"), layer.tail.view(), strict=True):
        states = tail.new_zeros(*tail.shape[:2], layer.seen, tail.shape[3])
        states[:, :, sealed:] = tail
        for row in range(layer.tail.batch):
            for span in layer.pages.spans([row]):
                columns = span["positions"][0].long().to(states.device)
                heads = torch.arange(states.shape[1], device=states.device)[:, None]
                states[row, heads, columns] = span[name][0]
        full.append(states)
    if layer.latent_rank is not None:
        rank = layer.latent_rank
        return full[0][..., :rank], full[0][..., rank:]
    return full[0], full[1]
