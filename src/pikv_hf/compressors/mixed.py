"""The base class of compressors whose pages have different encodings."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .base import Compressor


class MixedCompressor(Compressor):
    """A compressor that chooses one of several compressors for each page when it is sealed.

    A page is encoded and read by its member alone, as a row of its own: keys of n pages come as
    [n, 1, 1, P, Dk]. `observed_queries` must cover the members that need queries, such as `ThinK`.
    """

    @property
    @abstractmethod
    def members(self) -> tuple[Compressor, ...]:
        """The compressors to choose from."""

    @abstractmethod
    def assign(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """Choose the member of each page, int64 [R, H, S], as in `PageCodec.assign`."""

    @property
    def is_idempotent(self) -> bool:
        return all(member.is_idempotent for member in self.members)

    def check(self, model: PreTrainedModel) -> None:
        for member in self.members:
            member.check(model)

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        for member in self.members:
            member.check_dims(key_dim, value_dim)

    def tensors(self) -> Iterator[Tensor]:
        for member in self.members:
            yield from member.tensors()

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} has no encoding of its own: its members have.")

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} has no encoding of its own: its members have.")


def check_members(argument: str, members: Any) -> None:
    """Raise an error unless `members` can be the members of a mixed compressor.

    Calibrated compressors are refused: they need pages by KV head, but members get them mixed.
    """
    if not isinstance(members, tuple) or not members:
        raise TypeError(f"`{argument}` is {members!r}; it must be a tuple of compressors.")
    for member in members:
        if not isinstance(member, Compressor):
            raise TypeError(f"`{argument}` has {member!r}, which is no Compressor.")
        if isinstance(member, MixedCompressor) or member.needs_calibration:
            raise ValueError(
                f"`{argument}` has {member!r}; it must have none that is calibrated or mixed itself."
            )
