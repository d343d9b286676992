"""What a compressor does whose pages have different encodings."""

from abc import abstractmethod

from torch import Tensor

from .base import Compressor


class MixedCompressor(Compressor):
    """Chooses one of several compressors for each page, when it is sealed.

    Its pages are encoded and read by the chosen ones, which see every page alone: R pages of one
    row and one head each.
    """

    @property
    @abstractmethod
    def members(self) -> tuple[Compressor, ...]:
        """The compressors to choose from."""

    @abstractmethod
    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        """The member of each page, int64 [R, H, S], for `keys` [R, H, S, P, Dk] and `values`.

        `queries` [R, H, Q, Dk] as in `encode_observed`; None before any query was seen.
        """

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        for member in self.members:
            member.check_dims(key_dim, value_dim)

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} has no encoding of its own: its members have.")

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} has no encoding of its own: its members have.")
