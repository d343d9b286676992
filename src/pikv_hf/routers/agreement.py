"""Routers that compare the experts of pages with the experts of the query: PiKV's own.

Shapes: R rows, H KV heads, q queries, M pages of P tokens, k experts of a token, E experts.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..model.gates import page_shares, shares
from ..validation import check_number
from .page_router import PageRouter, Pages, Query
from .quest import bound_scores, page_bounds

DECAY = 0.9  # of the moving averages
SOURCES = ("previous_layer", "previous_token", "early_gate")


@dataclass(frozen=True)
class Agreement(PageRouter):
    """Scores a page by how much its experts and the query's agree, and by terms of PiKV's rules.

    The score is `agreement` x (sum over the query's experts e of w(e) x the share of e in the page) -
    `alpha` x (load of the page's bucket - 1) - `penalty` x log(1 + misses of the bucket) - `beta` x
    (entropy of the page's shares / log E) + `bound` x (Quest's bound of the page's logits).

    w(e) are the weights of the gate over their sum, and a page's shares are the mean of w over its
    tokens. The bucket of a page is the expert with its largest share. The load is the moving average
    of the reads of a bucket, whose mean over buckets is 1; misses are the moving average of its
    pages that were read although the device does not hold them. Each row has its own averages, which
    `crop` does not take back.

    A layer without a gate uses Quest's bound alone.

    Args:
        experts_from: which experts are compared, as the layer's gate chooses the query's only after
            its attention. "previous_layer": those that the previous layer's gate chose for the query's
            token and for the tokens of the pages; the first layer uses its own gate and the previous
            token. "previous_token": those that this layer's gate chose, for the query the ones of
            the token before. "early_gate": those that this layer's gate chose, for the query the
            ones that it would choose for the layer's input, normalised by the norm before the gate.
    """

    agreement: float = 1.0
    alpha: float = 0.0
    penalty: float = 0.0
    beta: float = 0.0
    bound: float = 0.0
    experts_from: str = "previous_layer"
    has_ties: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("agreement", "alpha", "penalty", "beta", "bound"):
            value = getattr(self, name)
            check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"`{name}` is {value!r}; it must be a number, 0 or more.")
        if self.experts_from not in SOURCES:
            raise ValueError(
                f"`experts_from` is {self.experts_from!r}; it must be one of {SOURCES}."
            )

    @property
    def needs_labels(self) -> bool:
        return True

    @property
    def source(self) -> str:
        return self.experts_from

    @property
    def has_state(self) -> bool:
        return self.alpha > 0 or self.penalty > 0

    def remark(self, *, has_gate: bool, has_far_pages: bool) -> str | None:
        if not has_gate:
            return "no gate: pages are selected by Quest's bound"
        if self.penalty and not has_far_pages:
            return "no page is far, so that the router's `penalty` has no effect"
        return None

    def digest(
        self, keys: Tensor, known: dict[str, Tensor], num_experts: int | None
    ) -> dict[str, Tensor]:
        if num_experts is None:
            return {"bounds": page_bounds(keys)}
        digests = {"shares": page_shares(known["experts"], known["weights"], num_experts)}
        return digests | ({"bounds": page_bounds(keys)} if self.bound else {})

    def prepared(self, digests: dict[str, Tensor], is_full: Tensor) -> dict[str, Tensor]:
        more = {}
        if "shares" in digests and self.beta:
            entropy = torch.special.entr(digests["shares"]).sum(-1)
            more["entropy"] = entropy / math.log(max(digests["shares"].shape[-1], 2))
        if "shares" in digests and self.has_state:
            more["bucket"] = digests["shares"].argmax(-1)
        return digests | more

    def scores(self, query: Query, pages: Pages) -> Tensor:
        digests = pages.digests
        if "shares" not in digests:
            return bound_scores(query, digests["bounds"])
        page = digests["shares"]
        scores = page.new_zeros(*page.shape[:2], 1, 1, page.shape[2])
        if query.experts is not None and query.weights is not None:
            own = page.new_zeros(*query.experts.shape[:2], page.shape[-1])
            own.scatter_add_(2, query.experts.long(), shares(query.weights))
            scores = scores + self.agreement * (own[:, None] @ page.mT)[:, :, None]
        if self.beta:
            scores = scores - self.beta * digests["entropy"][:, :, None, None]
        if query.state is not None:
            loads, misses = query.state.unbind(1)
            fines = self.alpha * (loads - 1) + self.penalty * torch.log1p(misses)
            bucket = digests["bucket"].expand(len(fines), -1, -1)
            scores = (
                scores - fines.gather(1, bucket.flatten(1)).view(bucket.shape)[:, :, None, None]
            )
        if self.bound:
            scores = scores + self.bound * query.scale * bound_scores(query, digests["bounds"])
        return scores

    def updated(self, query: Query, read: list[tuple[Pages, Tensor, Tensor]]) -> Tensor | None:
        if "bucket" not in read[0][0].digests:
            return None  # a layer without a gate
        shares_of = read[0][0].digests["shares"]
        new = shares_of.new_zeros(len(read[0][1]), 2, shares_of.shape[-1])
        for pages, *counts in read:
            bucket = pages.digests["bucket"].expand(counts[0].shape).flatten(1)
            for number, count in enumerate(counts):
                new[:, number].scatter_add_(1, bucket, count.flatten(1))
        loads = new[:, 0]
        loads /= loads.mean(-1, keepdim=True).clamp_min(torch.finfo(new.dtype).tiny)
        if query.state is None:
            start = torch.stack([torch.ones_like(loads), torch.zeros_like(loads)], dim=1)
        else:
            start = query.state
        return torch.lerp(new, start, DECAY)


@dataclass(frozen=True)
class TopK(Agreement):
    """Agreement alone: PiKV's R_T (arXiv 2508.06526, table 1), with pages instead of experts."""


@dataclass(frozen=True)
class Balanced(Agreement):
    """Agreement, less `alpha` times the load of the page's bucket: PiKV's R_LB."""

    alpha: float = 0.1


@dataclass(frozen=True)
class CacheAware(Agreement):
    """Agreement, less `penalty` times the misses of the page's bucket: PiKV's R_P.

    Without placement="offload" the device holds all pages, so that it equals `TopK`.
    """

    penalty: float = 0.05


@dataclass(frozen=True)
class Entropy(Agreement):
    """Agreement, less `beta` times the entropy of the page's shares: PiKV's R_E.

    Pages of few experts are read before pages of many. In the authors' code the entropy is of the
    query's own distribution: the same for all pages, so that it changes no choice.
    """

    beta: float = 0.1


@dataclass(frozen=True)
class PiKVRouter(Agreement):
    """Quest's bound and `CacheAware` in one score: PiKV's own router. One unit is one logit."""

    penalty: float = 0.05
    bound: float = 1.0
