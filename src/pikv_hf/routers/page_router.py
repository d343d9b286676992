"""The base class of routers that select pages by a score.

Shapes: R rows, H KV heads, G query heads of each, q queries, S new pages of P tokens, M pages, D key
dim, k experts of a token, E experts.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..validation import check_bytes, check_count, check_number
from .base import Router

SIZES = ("top_pages", "fraction", "top_p", "read_bytes")
DEFAULT_FRACTION = 0.25


@dataclass(frozen=True)
class Query:
    """The newest queries of a layer, for which pages are selected.

    `states` [R, H, G, q, D] as attention has them, `scale` their factor; `positions()` [R or 1, q]
    is the number of tokens of the row before each. `experts` and `weights` [R, q, k] foretell the
    choice of the gate for their tokens; None = nothing is known, or the layer has no gate.
    `state` [R, ...] is what `PageRouter.updated` has returned before. `max_pages`: most pages that a
    KV head reads; `limits` [R, H]: those that each reads, None = `max_pages`.
    """

    states: Tensor
    scale: float
    positions: Callable[[], Tensor]
    layer_idx: int
    max_pages: int
    experts: Tensor | None = None
    weights: Tensor | None = None
    state: Tensor | None = None
    limits: Tensor | None = None


@dataclass(frozen=True)
class Pages:
    """Pages of one store, among which a router selects: M of each row and KV head.

    `digests` [R or 1, H or 1, M, ...] is what `PageRouter.digest` made of them, `numbers`
    [R or 1, H or 1, M] int64 the number of tokens of the row before each page, over the page size.
    `keys()` decodes their keys [R, H, M, P, D].
    """

    digests: dict[str, Tensor]
    numbers: Tensor
    keys: Callable[[], Tensor]


@dataclass(frozen=True)
class PageRouter(Router):
    """Gives each page a score for a query, and reads the pages with the highest scores.

    Each KV head reads pages of its own. The pages of the first tokens (sinks), pages that are not
    full and the tail are always read; sinks count as selected pages, the others do not. Prompts read
    all pages: only generated tokens select.

    Args:
        top_pages: number of pages that a KV head reads.
        fraction: share of a KV head's pages that it reads, rounded up; 0.25 if no size is given.
        top_p: a KV head reads the fewest full pages whose part in the softmax of its scores is at
            least `top_p`. Off the CPU it waits for the device in each layer.
        read_bytes: bytes of encoded pages that one row reads in a step, over all layers: a number,
            or text such as "64MiB".
    """

    #: True if pages often have equal scores: of these the newest are read, at the cost of a sort.
    has_ties: ClassVar[bool] = False

    top_pages: int | None = field(default=None, kw_only=True)
    fraction: float | None = field(default=None, kw_only=True)
    top_p: float | None = field(default=None, kw_only=True)
    read_bytes: int | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            both = " and ".join(f"`{name}` is {getattr(self, name)!r}" for name in given)
            raise ValueError(f"{both}; a router takes one of {', '.join(SIZES)}.")
        if self.top_pages is not None:
            check_count("top_pages", self.top_pages)
        for name in ("fraction", "top_p"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        if self.read_bytes is not None:
            check_bytes("read_bytes", self.read_bytes, 1)

    @property
    def needs_labels(self) -> bool:
        return False

    @property
    def source(self) -> str:
        """What foretells the experts of a query: "previous_layer", "previous_token" or "early_gate"."""
        return "previous_layer"

    @property
    def is_splittable(self) -> bool:
        """True if some of a layer's KV heads alone read what they read among all."""
        return not self.has_state

    @property
    def has_state(self) -> bool:
        """True if `updated` is to be called."""
        return False

    def digest(
        self, keys: Tensor, known: dict[str, Tensor], num_experts: int | None
    ) -> dict[str, Tensor]:
        """Return what `scores` reads of sealed pages: tensors [R or 1, H or 1, S, ...] by name.

        `keys` [R, H, S, P, D] are decoded. `known` [R or 1, H or 1, S, P, ...] has the `positions`
        (columns) of the tokens and, if `needs_labels` and the layer has a gate, `experts` [..., k]
        int16 and `weights`. The gate chooses from `num_experts`; None = there is no gate. Digests
        count as held bytes.
        """
        return {}

    def prepared(self, digests: dict[str, Tensor], is_full: Tensor) -> dict[str, Tensor]:
        """Return `digests` of all M pages with what is made of them once, when pages were added.

        `is_full` [R or 1, H or 1, M] is False at pages that are not full, which are always read, and
        where there is no page.
        """
        return digests

    @abstractmethod
    def scores(self, query: Query, pages: Pages) -> Tensor:
        """Return the scores [R, H or 1, G or 1, q, M] of `pages`, float. Changes nothing."""

    def over_group(self, scores: Tensor) -> Tensor:
        """Return scores [R, H, q, M] of KV heads for `scores` [R, H, G, q, M] of their query heads.

        M counts the pages of all stores; those that are not full have the score minus infinity. By
        default the maximum counts.
        """
        return scores.amax(2) if scores.shape[2] > 1 else scores[:, :, 0]

    def logits(self, scores: Tensor, scale: float) -> Tensor:
        """Return scores [R, H, q, M] of KV heads as logits of attention, for `top_p`."""
        return scores.float()

    def updated(self, query: Query, read: list[tuple[Pages, Tensor, Tensor]]) -> Tensor | None:
        """Return the state [R, ...] after pages were read, which later queries are given.

        `read` lists the pages of each store, how many of the queries read each [R, H, M], float32, and
        how many of these reads were not from memory of the device. Pages that are not full count 0.
        """
        return None

    def counts(self, full: Tensor, sinks: int, page_bytes: int) -> Tensor:
        """Return how many of its `full` [R, H] pages each KV head reads; at least `sinks` of them.

        `page_bytes`: bytes of a page of all KV heads and layers.
        """
        if self.top_pages is not None:
            wanted = torch.full_like(full, self.top_pages)
        elif self.top_p is not None:
            wanted = full
        elif self.read_bytes is not None:
            nbytes = check_bytes("read_bytes", self.read_bytes, 1)
            wanted = torch.full_like(full, nbytes // page_bytes)
        else:
            # Rounded first, as 0.07 * 100 is more than 7.
            share = DEFAULT_FRACTION if self.fraction is None else self.fraction
            wanted = (full.double() * share).mul(1e9).round().div(1e9).ceil().long()
        return wanted.clamp_min(sinks).minimum(full)


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number above 0 and at most 1."""
    check_number(name, value, "(0, inf)")
    if value > 1:
        raise ValueError(f"`{name}` is {value!r}; it must be a number in (0, 1].")
