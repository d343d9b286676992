from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Compressor
from .integer import Int2, Int4, Int8
from .mixed import MixedCompressor, check_members
from .observed_attention import page_masses, queries_or_stand_ins


@dataclass(frozen=True)
class Pyramid(MixedCompressor):
    """Stores pages in tiers, with more bits the more the newest queries attend to a page.

    PiKV (arXiv 2508.06526) names a pyramid of precisions without defining one. Here the pages of a
    row that are sealed together are ordered, over all its KV heads, by the attention that the
    observed queries pay to a page (mean over queries of the softmax over these pages). The first
    `shares[0]` of the pages get `tiers[0]`, and so on, rounded to whole pages. Without queries
    the newest keys replace them. Pages keep their tier until eviction seals them again.

    Args:
        tiers: compressors, the finest first; calibrated ones are refused.
        shares: shares of the pages, one for each tier; their sum is 1.
    """

    observed_queries: ClassVar[int] = 32

    tiers: tuple[Compressor, ...] = (Int8(), Int4(), Int2())
    shares: tuple[float, ...] = (0.25, 0.5, 0.25)

    def __post_init__(self) -> None:
        check_members("tiers", self.tiers)
        shares = self.shares
        if not isinstance(shares, tuple) or not all(isinstance(s, int | float) for s in shares):
            raise TypeError(f"`shares` is {shares!r}; it must be a tuple of numbers.")
        if len(shares) != len(self.tiers) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"`shares` is {shares}; it must be one number for each of {len(self.tiers)} tiers, "
                "none negative, that sum up to 1."
            )

    @property
    def members(self) -> tuple[Compressor, ...]:
        return self.tiers

    def assign(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        masses = page_masses(keys, queries_or_stand_ins(keys, queries))
        flat = masses.flatten(1)
        order = flat.argsort(dim=-1, descending=True, stable=True)
        tier = torch.tensor(self._tiers_of(flat.shape[1]), device=flat.device)
        return torch.empty_like(order).scatter_(1, order, tier.expand_as(order)).view(masses.shape)

    def _tiers_of(self, pages: int) -> list[int]:
        """Return the tier of each of `pages` pages, the most important page first."""
        ends = [round(sum(self.shares[: i + 1]) * pages) for i in range(len(self.shares) - 1)]
        return [sum(place >= end for end in ends) for place in range(pages)]

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        sizes = key_dim, value_dim, element_size, page_size
        tiers = (tier.bytes_per_token(*sizes) for tier in self.tiers)
        return sum(share * nbytes for share, nbytes in zip(self.shares, tiers, strict=True))
