"""The rules of all routers in plain Python and float64, one page after the other.

Written from the docstrings of the routers; nothing of `pikv_hf` is called.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STEPS, DECAY = 4, 0.9


@dataclass(frozen=True)
class Page:
    """A sealed page of one row and KV head: its `keys` and `values` [tokens, D] as they decode.

    `key` identifies the page, `columns` and `positions` are of its tokens. `shares` [E] are the mean
    shares of the experts; None = the layer has no gate. `is_free`: it is read only if it is selected.
    """

    key: tuple[int, int]
    columns: tuple[int, ...]
    positions: tuple[int, ...]
    number: int
    keys: Tensor
    values: Tensor
    shares: Tensor | None
    is_full: bool
    is_free: bool
    is_near: bool
    found: dict[int, Any] = field(default_factory=dict)  # centroids, by their number

    @property
    def bucket(self) -> int:
        assert self.shares is not None, "the layer has a gate"
        return int(self.shares.argmax())


@dataclass(frozen=True)
class Asked:
    """A query of one row and KV head: `states` [G, D]; `own` [E] are the shares that are foretold."""

    states: Tensor
    scale: float
    position: int
    layer: int
    head: int
    own: Tensor | None
    loads: Tensor
    misses: Tensor


def bound(query: Tensor, keys: Tensor) -> Tensor:
    return torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum()


def bounds(asked: Asked, keys: Tensor) -> float:
    return max(float(bound(query, keys)) for query in asked.states)


def hashed(number: int) -> int:
    """The finaliser of MurmurHash3, with signed numbers."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        number = signed((number ^ (number >> 33)) * multiplier)
    return number >> 11


def signed(number: int) -> int:
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def random(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    stream = (router.seed * 1009 + asked.layer) * 4099 + asked.head
    drawn = hashed(signed((stream << 32) + asked.position))
    return [hashed(signed(drawn + page.number)) / 2**53 for page in pages]


def turns(router: Any, asked: Asked, buckets: list[int]) -> list[float]:
    """The number of turns until a bucket is read, negative."""
    return [-float((bucket - asked.position) % router.buckets) for bucket in buckets]


def round_robin(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    return turns(router, asked, [page.number % router.buckets for page in pages])


def by_hash(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    numbers = [hashed(signed(page.number + (router.seed << 32))) for page in pages]
    return turns(router, asked, [number % router.buckets for number in numbers])


def quest(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    return [bounds(asked, page.keys) for page in pages]


def hierarchical(router: Any, asked: Asked, pages: list[Page], count: int) -> list[float]:
    """Minus infinity for pages of clusters that are not searched; stores are searched apart."""
    scores = [-math.inf] * len(pages)
    for store in sorted({page.key[0] for page in pages}):
        own = [index for index, page in enumerate(pages) if page.key[0] == store]
        clusters = [own[start : start + router.width] for start in range(0, len(own), router.width)]
        clusters = [[index for index in each if pages[index].is_full] for each in clusters]
        clusters = [cluster for cluster in clusters if cluster]
        joined = [torch.cat([pages[index].keys for index in cluster]) for cluster in clusters]
        order = sorted(range(len(clusters)), key=lambda n: -bounds(asked, joined[n]))
        for number in order[: math.ceil(router.spread * count / router.width)]:
            for index in clusters[number]:
                scores[index] = bounds(asked, pages[index].keys)
    return scores


def centroids_of(keys: Tensor, count: int) -> list[tuple[Tensor, int]]:
    """K-means, from keys at equal distances: centroids with the numbers of their keys."""
    count = min(count, len(keys))
    centroids = [keys[number * len(keys) // count] for number in range(count)]
    for _ in range(STEPS):
        members: list[list[Tensor]] = [[] for _ in range(count)]
        for key in keys:
            distances = [float((key - centroid).square().sum()) for centroid in centroids]
            members[distances.index(min(distances))].append(key)
        centroids = [
            torch.stack(own).mean(0) if own else centroid
            for own, centroid in zip(members, centroids, strict=True)
        ]
    return [(c, len(own)) for c, own in zip(centroids, members, strict=True) if own]


def clusters(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    scores = []
    for page in pages:
        total = 0.0
        if router.centroids not in page.found:
            page.found[router.centroids] = centroids_of(page.keys, router.centroids)
        for centroid, count in page.found[router.centroids]:
            for query in asked.states:
                total += count * math.exp(float(query @ centroid) * asked.scale)
        scores.append(math.log(total))
    return scores


def oracle(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    scores = torch.zeros(len(pages), dtype=torch.float64)
    for query in asked.states:
        masses = torch.stack([(page.keys @ query * asked.scale).exp().sum() for page in pages])
        scores += masses / sum(masses[n] for n, page in enumerate(pages) if page.is_full)
    return scores.log().tolist()


def agreement(router: Any, asked: Asked, pages: list[Page]) -> list[float]:
    scores = []
    for page in pages:
        if page.shares is None:
            scores.append(bounds(asked, page.keys))
            continue
        score = 0.0 if asked.own is None else router.agreement * float(asked.own @ page.shares)
        entropy = -sum(float(s) * math.log(float(s)) for s in page.shares if s > 0)
        score -= router.beta * entropy / math.log(len(page.shares))
        score -= router.alpha * (float(asked.loads[page.bucket]) - 1)
        score -= router.penalty * math.log(1 + float(asked.misses[page.bucket]))
        score += router.bound * bounds(asked, page.keys) * asked.scale
        scores.append(score)
    return scores


AGREEMENT = ("topk", "balanced", "cache_aware", "entropy", "pikv")
FORMULAS: dict[str, Any] = {
    "random": random,
    "hash": by_hash,
    "round_robin": round_robin,
    "quest": quest,
    "adaptive": quest,
    "clusters": clusters,
    "oracle": oracle,
    **dict.fromkeys(AGREEMENT, agreement),
}


def scores_of(
    name: str, router: Any, asked: Asked, pages: list[Page], count: int
) -> tuple[list[float], list[float]]:
    """The scores of `pages`, and the logits whose softmax `top_p` divides; `count` are read."""
    if name == "hierarchical":
        scores = hierarchical(router, asked, pages, count)
    else:
        scores = FORMULAS[name](router, asked, pages)
    is_bound = name in ("quest", "adaptive", "hierarchical")
    return scores, [score * asked.scale for score in scores] if is_bound else scores


def count_of(router: Any, pages: list[Page], sinks: int, page_size: int, page_bytes: int) -> int:
    """How many pages are read of a head that `pages` are of; None of `top_p`."""
    full = sum(page.is_full for page in pages)
    if router.top_p is not None:
        return len(pages)
    if router.top_pages is not None:
        wanted = router.top_pages
    elif router.read_bytes is not None:
        wanted = router.read_bytes // page_bytes
    else:
        share = 0.25 if router.fraction is None else router.fraction
        wanted = math.ceil(round(share * full, 9))
    wanted = max(wanted, math.ceil(sinks / page_size))
    return min(wanted, full) + len(pages) - full


def updated(old: Tensor, reads: Tensor, misses: Tensor) -> Tensor:
    """Moving averages [2, E] of the loads and the misses of experts, after the newest reads."""
    loads = reads / reads.mean() if reads.any() else reads
    return DECAY * old + (1 - DECAY) * torch.stack([loads, misses])
