from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..storage.codec import encoded
from ..validation import check_number
from .base import Compressor
from .identity import Identity
from .integer import Int2, Int4, Int8
from .mixed import MixedCompressor, check_members
from .observed_attention import output_errors, queries_or_stand_ins
from .svd import Svd
from .turboquant import TurboQuant

# Share by which weights of observed queries are moved to their mean. A lower share spoils pages
# that only later queries attend to; a higher share learns too little from observed queries.
SHRINK = 0.5

CANDIDATES = (
    Identity(),
    Int8(),
    Int4(),
    TurboQuant(bits=4),
    TurboQuant(bits=3),
    Int2(),
    TurboQuant(bits=2),
    Svd(rank=8),
)


@dataclass(frozen=True)
class PiKV(MixedCompressor):
    """Stores each page in the encoding that saves attention the most error for its bytes.

    An interpretation of PiKV's hybrid compressor (arXiv 2508.06526): every page is encoded in all
    ways, and the error in the output of attention for the observed queries is measured and divided
    among the pages (`output_errors`). Of encodings of equal size each KV head takes the better one.
    The budget is `share` of the full bytes of the pages of a row, of all KV heads, that are sealed
    together. All pages begin with the one size of least error that fits the budget; the rest of the
    budget is spent where a byte reduces the error most, page by page along the lower convex hull of
    (bytes, error). So no page is worse off than with the best single encoding of that budget. No
    token is dropped.

    Args:
        share: bytes that pages may take, as a share of their bytes in a full cache, in (0, 1].
        candidates: the encodings to choose from; calibrated ones are refused.
    """

    observed_queries: ClassVar[int] = 32

    share: float = 0.3
    candidates: tuple[Compressor, ...] = CANDIDATES

    def __post_init__(self) -> None:
        check_members("candidates", self.candidates)
        check_number("share", self.share, "(0, 1]")

    @property
    def members(self) -> tuple[Compressor, ...]:
        return self.candidates

    def alternatives(self) -> tuple[Compressor, ...]:
        return (replace(self, share=min(2 * self.share, 1.0)),)

    def assign(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Tensor:
        queries = queries_or_stand_ins(keys, queries)
        page = keys[:1, :1, :1], values[:1, :1, :1]
        fields = (encoded(member, *page, queries[:1, :1]) for member in self.candidates)
        sizes = [sum(t.numel() * t.element_size() for t in each.values()) for each in fields]
        full = sum(t.numel() * t.element_size() for t in page)
        allowed = self.share * full * (1 + 1e-9)  # a share computed from bytes may be rounded
        if min(sizes) > allowed:
            min_share = min(sizes) / full
            raise ValueError(
                f"`share` is {self.share}, but no candidate takes less than {min_share:.3f} of the bytes "
                "of these pages: raise it, or add a candidate."
            )
        errors = output_errors(self.candidates, keys, values, queries, SHRINK).double()
        errors, members, sizes = best_of_equal(errors, sizes)
        bytes_ = torch.tensor(sizes, dtype=torch.float64, device=keys.device)
        choice = cheapest(errors.flatten(2), bytes_, allowed).view(errors.shape[1:])
        return members[..., None].expand_as(errors).gather(0, choice[None])[0]

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        return self.share * (key_dim + value_dim) * element_size


def best_of_equal(errors: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Keep, of encodings of equal size, the encoding of least error in each KV head.

    `errors` is [M, R, H, S] and `sizes` [M]. Returns the errors [U, R, H, S] of U different sizes,
    the index of the encoding that each size stands for, [U, R, H], and the sizes.
    """
    found, members, different = [], [], sorted(set(sizes))
    for size in different:
        alike = torch.tensor([m for m, other in enumerate(sizes) if other == size])
        alike = alike.to(errors.device)
        members.append(alike[errors[alike].sum(-1).argmin(0)])
        index = members[-1][None, ..., None].expand(1, *errors.shape[1:])
        found.append(errors.gather(0, index)[0])
    return torch.stack(found), torch.stack(members), different


def cheapest(errors: Tensor, sizes: Tensor, allowed: float) -> Tensor:
    """Choose each page's encoding, int64 [R, n], for least error at `allowed` mean bytes a page.

    `errors` [M, R, n] is the error of each page in each encoding, `sizes` [M] the bytes of a page.
    Each row has its own budget.
    """
    order = sizes.argsort(stable=True)
    errors, sizes = errors[order], sizes[order]
    fits = (sizes <= allowed)[:, None]
    start = errors.sum(-1).masked_fill(~fits, torch.inf).argmin(0)
    room = (allowed - sizes[start]) * errors.shape[-1]
    now = start[:, None].expand(errors.shape[1:])
    steps = list(_hull(errors, sizes, now))
    if not steps:
        return order[now]
    gains, costs, _ = (torch.cat(column, dim=1) for column in zip(*steps, strict=True))
    best = gains.argsort(dim=1, descending=True, stable=True)
    affordable = costs.gather(1, best).cumsum(1) <= room[:, None]
    # Gains fall along a hull, so the steps that are bought for a page are its first steps.
    bought = torch.zeros_like(affordable).scatter_(1, best, affordable) & (gains > 0)
    for taken, (_, _, encoding) in zip(bought.chunk(len(steps), dim=1), steps, strict=True):
        now = torch.where(taken, encoding, now)
    return order[now]


def _hull(errors: Tensor, sizes: Tensor, now: Tensor) -> "list[tuple[Tensor, Tensor, Tensor]]":
    """Return steps [R, n] up the lower convex hull from `now`: gain per byte, bytes, encoding.

    A page at the end of its hull takes steps of no gain and no bytes.
    """
    steps = []
    for _ in range(len(sizes) - 1):
        error = errors.gather(0, now[None])
        cost = sizes[:, None, None] - sizes[now]
        gain = ((error - errors) / cost).masked_fill(cost <= 0, 0.0)
        best, encoding = gain.max(0)
        encoding = torch.where(best > 0, encoding, now)
        steps.append((best.clamp_min(0), sizes[encoding] - sizes[now], encoding))
        now = encoding
    return steps
