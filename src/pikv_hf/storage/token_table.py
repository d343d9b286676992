"""Tokens of several rows, with all that is known of each token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gather import taken
from .memory import empty_like, own

CODE = "code of "


@dataclass(frozen=True)
class TokenTable:
    """T consecutive tokens of R rows and H KV heads: tensors [R or 1, H or 1, T, ...] by name.

    A 1 stands for "the same in all rows" or "in all heads". Names in use: `keys` and `values`;
    `positions`, the column of the sequence; `valid`, where there is a token, if not everywhere; `experts` and `weights`, the k experts that the model's
    gate chose for the token and their weights as the gate returned them. No method changes a tensor.
    """

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[2]

    def without(self, *names: str) -> "TokenTable":
        return TokenTable({k: v for k, v in self.tensors.items() if k not in names})

    def joined(self, other: "TokenTable") -> "TokenTable":
        """The same tokens with the tensors of `other` beside those of this one."""
        return TokenTable(self.tensors | other.tensors)

    def rows(self, index: Tensor) -> "TokenTable":
        return self._map(lambda t: t if t.shape[0] == 1 else t.index_select(0, index.to(t.device)))

    def tokens(self, index: Tensor) -> "TokenTable":
        return self._map(lambda t: t.index_select(2, index.to(t.device)))

    def narrow(self, start: int, length: int) -> "TokenTable":
        return self._map(lambda t: t.narrow(2, start, length))

    def owned(self) -> "TokenTable":
        """The same in tensors that keep nothing larger alive."""
        return self._map(own)

    def gather(self, keep: Tensor) -> "TokenTable":
        """Tokens `keep` [R, H, K], chosen for each row and head apart."""
        return self._map(lambda t: taken(t, keep.to(t.device)))

    def codes(self) -> dict[str, Tensor]:
        """The tokens as a compressor has encoded them, by the names of its fields."""
        return {k.removeprefix(CODE): v for k, v in self.tensors.items() if k.startswith(CODE)}

    def with_codes(self, codes: dict[str, Tensor]) -> "TokenTable":
        """The same tokens with their codes [R, H, T, ...]."""
        return self.joined(TokenTable({CODE + name: tensor for name, tensor in codes.items()}))

    def without_codes(self) -> "TokenTable":
        return TokenTable({k: v for k, v in self.tensors.items() if not k.startswith(CODE)})

    def then(self, newer: "TokenTable") -> "TokenTable":
        """This span followed by `newer`, in the tensors that both have.

        Places of the one are `valid` if it does not say so while the other does.
        """
        if ("valid" in self) != ("valid" in newer):
            return self.all_valid().then(newer.all_valid())

        def concatenate(name: str) -> Tensor:
            a, b = self[name], newer[name].to(self[name].device)
            lead = [max(x, y) for x, y in zip(a.shape[:2], b.shape[:2], strict=True)]
            return torch.cat([t.expand(*lead, *t.shape[2:]) for t in (a, b)], dim=2)

        return TokenTable({name: concatenate(name) for name in self.tensors if name in newer})

    def all_valid(self) -> "TokenTable":
        """The same with `valid`, which is true everywhere if it was not there."""
        device = next(iter(self.tensors.values())).device
        ones = torch.ones(1, 1, len(self), dtype=torch.bool, device=device)
        return TokenTable({"valid": ones} | self.tensors)

    def front(self) -> "TokenTable":
        """The same with the valid places of each row and head before the others."""
        if "valid" not in self:
            return self
        return self.gather(self["valid"].int().argsort(dim=-1, descending=True, stable=True))

    def with_room(self, tokens: int) -> "TokenTable":
        """Copies long enough for `tokens`, the rest unwritten."""

        def widen(t: Tensor) -> Tensor:
            room = empty_like(t, (*t.shape[:2], tokens, *t.shape[3:]))
            room.narrow(2, 0, t.shape[2]).copy_(t)
            return room

        return self._map(widen)

    def write(self, start: int, newer: "TokenTable") -> None:
        """Overwrite the tokens from `start` on by those of `newer`, in place."""
        for name, tensor in self.tensors.items():
            tensor.narrow(2, start, len(newer)).copy_(newer[name])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenTable":
        return TokenTable({name: change(tensor) for name, tensor in self.tensors.items()})
