"""A table of the tokens of several rows, with all data of each token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gather import taken
from .memory import empty_like, on_device, own

CODE = "code of "


@dataclass(frozen=True)
class TokenTable:
    """T tokens of R rows and H KV heads, as tensors [R or 1, H or 1, T, ...] by name.

    A size of 1 means that all rows, or all heads, share the entries. Names in use: `keys`,
    `values`; `positions`, columns of the sequence; `valid`, True where there is a token (absent =
    everywhere); `experts` and `weights`, the k experts that the model's gate chose for the token
    and their weights as the gate returned them; `record` and `constant`, numbers of a scheduler;
    `rest`, for rerotation; codes. Of the methods, only `write` changes tensors.
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

    def with_columns(self, other: "TokenTable") -> "TokenTable":
        """Return these tokens with the columns of `other` added."""
        return TokenTable(self.tensors | other.tensors)

    def select_rows(self, index: Tensor) -> "TokenTable":
        return self._map(lambda t: t if t.shape[0] == 1 else t.index_select(0, index.to(t.device)))

    def of_rows(self, rows: list[int]) -> "TokenTable":
        """Return the tokens of `rows`: views, if the rows follow one another."""
        if rows != list(range(rows[0], rows[0] + len(rows))):
            index = tuple(rows)
            return self._map(
                lambda t: t if t.shape[0] == 1 else t.index_select(0, on_device(index, t.device))
            )
        return self._map(lambda t: t if t.shape[0] == 1 else t.narrow(0, rows[0], len(rows)))

    def select_tokens(self, index: Tensor) -> "TokenTable":
        return self._map(lambda t: t.index_select(2, index.to(t.device)))

    def select_places(self, rows: list[int], places: Tensor) -> "TokenTable":
        """Gather the tokens `places` [n, K] of the n `rows`, in all heads."""
        return self.of_rows(rows)._map(
            lambda t: taken(t, places.to(t.device)[:, None].expand(-1, t.shape[1], -1))
        )

    def to(self, device: torch.device) -> "TokenTable":
        return self._map(lambda t: t.to(device))

    def for_rows(self, rows: int) -> "TokenTable":
        """Return these tokens with entries for each of `rows` rows, as views."""
        return self._map(lambda t: t.expand(rows, *t.shape[1:]))

    def narrow(self, start: int, length: int) -> "TokenTable":
        return self._map(lambda t: t.narrow(2, start, length))

    def owned(self) -> "TokenTable":
        """Return these tokens in tensors that keep no larger storage alive."""
        return self._map(own)

    def gather(self, keep: Tensor) -> "TokenTable":
        """Gather the tokens `keep` [R, H, K], chosen for each row and head separately."""
        return self._map(lambda t: taken(t, keep.to(t.device)))

    def codes(self) -> dict[str, Tensor]:
        """Return the codes of the tokens by the names of the compressor's fields."""
        return {k.removeprefix(CODE): v for k, v in self.tensors.items() if k.startswith(CODE)}

    def with_codes(self, codes: dict[str, Tensor]) -> "TokenTable":
        """Return these tokens with their codes [R, H, T, ...] added."""
        return self.with_columns(
            TokenTable({CODE + name: tensor for name, tensor in codes.items()})
        )

    def without_codes(self) -> "TokenTable":
        return TokenTable({k: v for k, v in self.tensors.items() if not k.startswith(CODE)})

    def followed_by(self, newer: "TokenTable") -> "TokenTable":
        """Return these tokens and then `newer`, with the columns that both tables have.

        If only one table has `valid`, all tokens of the other table are valid.
        """
        if ("valid" in self) != ("valid" in newer):
            return self.all_valid().followed_by(newer.all_valid())

        def concatenate(name: str) -> Tensor:
            a, b = self[name], newer[name].to(self[name].device)
            lead = [max(x, y) for x, y in zip(a.shape[:2], b.shape[:2], strict=True)]
            return torch.cat([t.expand(*lead, *t.shape[2:]) for t in (a, b)], dim=2)

        return TokenTable({name: concatenate(name) for name in self.tensors if name in newer})

    def all_valid(self) -> "TokenTable":
        """Return these tokens with `valid`, True everywhere if it was absent."""
        device = next(iter(self.tensors.values())).device
        ones = torch.ones(1, 1, len(self), dtype=torch.bool, device=device)
        return TokenTable({"valid": ones} | self.tensors)

    def valid_first(self) -> "TokenTable":
        """Return these tokens with the valid tokens of each row and head first."""
        if "valid" not in self:
            return self
        return self.gather(self["valid"].int().argsort(dim=-1, descending=True, stable=True))

    def in_order(self) -> "TokenTable":
        """Return these tokens with the tokens of each row and head in order of position."""
        order = self["positions"].argsort(dim=-1)

        def sort(t: Tensor) -> Tensor:
            lead = map(max, zip(order.shape[:2], t.shape[:2], strict=True))
            return taken(t, order.expand(*lead, -1).to(t.device))

        return self._map(sort)

    def with_room(self, tokens: int) -> "TokenTable":
        """Copy the tokens into tensors for `tokens` tokens; the rest is unwritten."""

        def widen(t: Tensor) -> Tensor:
            room = empty_like(t, (*t.shape[:2], tokens, *t.shape[3:]))
            room.narrow(2, 0, t.shape[2]).copy_(t)
            return room

        return self._map(widen)

    def write(self, start: int, newer: "TokenTable") -> None:
        """Overwrite the tokens from `start` on with the tokens of `newer`, in place."""
        for name, tensor in self.tensors.items():
            tensor.narrow(2, start, len(newer)).copy_(newer[name])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenTable":
        return TokenTable({name: change(tensor) for name, tensor in self.tensors.items()})


def rows_together(parts: list[TokenTable], groups: list[list[int]]) -> TokenTable:
    """Return the tokens of all rows, [R, H, T, ...] with zeros behind the tokens of shorter rows.

    `parts[i]` has the tokens of the batch rows `groups[i]`; the R rows are in ascending order. If
    any part has `valid`, so has the result.
    """
    if any("valid" in part for part in parts):
        parts = [part.all_valid() for part in parts]
    rows, width = sorted(row for group in groups for row in group), max(map(len, parts))
    places = [tuple(map(rows.index, group)) for group in groups]

    def filled(name: str) -> Tensor:
        tensors = [part[name] for part in parts]
        sample, heads = tensors[0], max(tensor.shape[1] for tensor in tensors)
        whole = sample.new_zeros(len(rows), heads, width, *sample.shape[3:])
        for tensor, place in zip(tensors, places, strict=True):
            tensor = tensor.expand(len(place), heads, *tensor.shape[2:])
            target = whole.narrow(2, 0, tensor.shape[2])
            target.index_copy_(0, on_device(place, whole.device), tensor)
        return whole

    names = (name for name in parts[0].tensors if all(name in part for part in parts))
    return TokenTable({name: filled(name) for name in names})
