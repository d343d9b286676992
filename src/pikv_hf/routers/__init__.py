"""Routers, which select the pages that a query reads: one file per method."""

from .adaptive import Adaptive
from .agreement import Agreement, Balanced, CacheAware, Entropy, PiKVRouter, TopK
from .all import All
from .base import Router
from .buckets import Hash, RoundRobin
from .clusters import Clusters
from .hierarchical import Hierarchical
from .oracle import Oracle
from .page_router import PageRouter, Pages, Query
from .quest import Quest
from .random import RandomPages

ROUTERS: dict[str, type[Router]] = {
    "all": All,
    "random": RandomPages,
    "hash": Hash,
    "round_robin": RoundRobin,
    "quest": Quest,
    "topk": TopK,
    "balanced": Balanced,
    "cache_aware": CacheAware,
    "pikv": PiKVRouter,
    "entropy": Entropy,
    "adaptive": Adaptive,
    "hierarchical": Hierarchical,
    "clusters": Clusters,
    "oracle": Oracle,
}

__all__ = [
    "ROUTERS",
    "Adaptive",
    "Agreement",
    "All",
    "Balanced",
    "CacheAware",
    "Clusters",
    "Entropy",
    "Hash",
    "Hierarchical",
    "Oracle",
    "PageRouter",
    "Pages",
    "PiKVRouter",
    "Query",
    "Quest",
    "RandomPages",
    "RoundRobin",
    "Router",
    "TopK",
]
