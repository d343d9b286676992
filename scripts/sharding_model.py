"""A model of a KV cache that is spread over ranks: bytes held, bytes sent, balance and time.

Nothing here is measured. Symbols: R ranks, L paged layers, T tokens, Hq query heads, Dk and Dv the
dims of a query and of an attention output that is sent, E experts of which a token takes k, N pages
of a layer. Bytes sent count one decode step of one batch row, for one rank and all layers.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PLACEMENTS = ("spread", "experts", "pikv_xor")
SIXTEEN_BITS, FLOAT32 = 2, 4  # bytes


@dataclass(frozen=True)
class Geometry:
    """The attention and the experts of a model, from the `config.json` of its Hub repository.

    `token_bytes` are the bfloat16 keys and values of a token in one layer, `out_dim` is the dim of
    the attention output that ranks exchange. The first `dense_layers` have no experts. Sliding
    layers are never spread: each rank holds `sliding_window` tokens of them.
    """

    name: str
    layers: int
    query_heads: int
    token_bytes: int
    key_dim: int
    out_dim: int
    experts: int
    top_k: int
    dense_layers: int = 0
    sliding_layers: int = 0
    sliding_window: int = 0
    #: Dim of the outputs that devices of one process send back; None = `out_dim`.
    back_dim: int | None = None


GEOMETRIES = (
    # Keys and values of 4, 8 and 8 heads; MLA holds one latent of 512 and 64 rotary dims, and projects
    # its outputs to values before they are sent.
    Geometry("Qwen3-30B-A3B", 48, 32, 2 * 4 * 128 * SIXTEEN_BITS, 128, 128, 128, 8),
    Geometry("Mixtral-8x7B", 32, 32, 2 * 8 * 128 * SIXTEEN_BITS, 128, 128, 8, 2),
    Geometry(
        "gpt-oss-120b",
        *(18, 64, 2 * 8 * 64 * SIXTEEN_BITS, 64, 64, 128, 4),
        sliding_layers=18,
        sliding_window=128,
    ),
    Geometry(
        "DeepSeek-V3", 61, 128, 576 * SIXTEEN_BITS, 576, 128, 256, 8, dense_layers=3, back_dim=576
    ),
)


@dataclass(frozen=True)
class Assumptions:
    """What the model assumes of the machine and of the cache.

    Attributes:
        batch: rows, each with all tokens.
        hbm: bytes per second that a rank reads from its memory.
        link: bytes per second that a rank sends.
        latency: seconds of a collective beside its bytes, whatever the number of ranks.
        window: newest tokens of a row, which every rank holds (`window` of PiKVCache).
        page: tokens of a page.
        capacity_factor: `capacity_factor` of the placement "experts".
        sampled_pages: pages whose tokens are drawn one by one to learn how pages are labelled.
        seed: of all random numbers.
    """

    batch: int = 1
    hbm: float = 3.0e12
    link: float = 50e9
    latency: float = 15e-6
    window: int = 512
    page: int = 64
    capacity_factor: float = 1.1
    sampled_pages: int = 1024
    seed: int = 0

    def pages(self, tokens: int) -> int:
        """Return the number of pages of a layer, for `tokens` tokens of a row."""
        return max(tokens - self.window, 0) // self.page


# ---- bytes sent ---------------------------------------------------------------------------------


def sent_all_gather(model: Geometry, ranks: int, tokens: int = 0) -> float:
    """Return L (R - 1) Hq (Dv + 1) 4: one all-gather of float32 (output, log-sum-exp).

    This is what PiKVCache does. Each rank sends its message to R - 1 others.
    """
    message = model.query_heads * (model.out_dim + 1) * FLOAT32
    return model.layers * (ranks - 1) * message


def sent_two_collectives(model: Geometry, ranks: int, tokens: int = 0) -> float:
    """Return L ((R - 1) Hq 4 + 2 (R - 1) / R Hq Dv 4): ring costs of two collectives.

    They are an all-gather of log-sum-exps and an all-reduce of rescaled float32 outputs. Source of
    ring costs: Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", 2009.
    """
    heads, out_dim = model.query_heads, model.out_dim
    all_gather = (ranks - 1) * heads * FLOAT32
    all_reduce = 2 * (ranks - 1) / ranks * heads * out_dim * FLOAT32
    return model.layers * (all_gather + all_reduce)


def sent_dcp(model: Geometry, ranks: int, tokens: int = 0) -> float | None:
    """Return L (R - 1) / R Hq (2 Dk + 4 R + 2 Dv): vLLM's decode context parallelism (DCP).

    Each rank has Hq / R query heads, by tensor parallelism. Queries are all-gathered over heads in
    16 bits, log-sum-exps in float32, and rescaled outputs reduce-scattered over heads in 16 bits
    (`cp_lse_ag_out_rs` in vllm/v1/attention/ops/common.py, vLLM #23734 and #24864). All ranks are
    taken as one DCP group, as with MLA; with H KV heads vLLM's groups have R / H ranks at most.
    None = R ranks cannot share the heads equally.
    """
    heads = model.query_heads
    if heads % ranks:
        return None
    queries = (ranks - 1) * heads / ranks * model.key_dim * SIXTEEN_BITS
    lse = (ranks - 1) * heads * FLOAT32
    outputs = (ranks - 1) / ranks * heads * model.out_dim * SIXTEEN_BITS
    return model.layers * (queries + lse + outputs)


def sent_gather_kv(model: Geometry, ranks: int, tokens: int) -> float:
    """Return L (R - 1) / R T token_bytes: an all-gather of the keys and values of all ranks."""
    return model.layers * (ranks - 1) / ranks * tokens * model.token_bytes


def sent_nothing(model: Geometry, ranks: int, tokens: int = 0) -> float:
    """Return 0: each rank holds all keys and values."""
    return 0.0


def moved_in_one_process(model: Geometry, devices: int) -> float:
    """Return L (R - 1) Hq (2 Dk + 2 Dv + 4): queries to R - 1 devices, outputs and lse back.

    Queries and outputs are of 16 bits, log-sum-exps float32. The sum over all links of the process.
    Of MLA, outputs are over latents and their rotary dims: the projection to values is on one device.
    """
    back = (model.back_dim or model.out_dim) * SIXTEEN_BITS + FLOAT32
    there = model.key_dim * SIXTEEN_BITS
    return model.layers * (devices - 1) * model.query_heads * (there + back)


@dataclass(frozen=True)
class Exchange:
    """A way to attend to a cache on R ranks: bytes sent, collectives of a layer, what is read."""

    name: str
    sent: Callable[[Geometry, int, int], float | None]
    collectives: int
    reads_all: bool = False


EXCHANGES = (
    Exchange("all KV on each rank", sent_nothing, 0, reads_all=True),
    Exchange("one all-gather (PiKVCache)", sent_all_gather, 1),
    Exchange("two collectives", sent_two_collectives, 2),
    Exchange("DCP as in vLLM", sent_dcp, 3),
    Exchange("gather KV", sent_gather_kv, 1, reads_all=True),
)


# ---- placements ---------------------------------------------------------------------------------


@functools.cache
def label_sample(model: Geometry, zipf: float, given: Assumptions) -> np.ndarray:
    """Return labels [S] of S pages: the most frequent expert of each, numbered by popularity.

    A token takes k different experts, drawn with probabilities that fall as 1 / rank ** zipf (the
    largest of log-probability + Gumbel noise). Tokens are independent of each other: real texts
    have bursts. Ties are broken at random.
    """
    rng = np.random.default_rng([given.seed, model.experts, model.top_k, round(100 * zipf)])
    log_p = -zipf * np.log(np.arange(1, model.experts + 1))
    labels = np.empty(given.sampled_pages, dtype=np.int64)
    for page in range(given.sampled_pages):
        noise = rng.gumbel(size=(given.page, model.experts))
        taken = np.argpartition(-(log_p + noise), model.top_k - 1)[:, : model.top_k]
        counts = np.bincount(taken.ravel(), minlength=model.experts)
        labels[page] = (counts + rng.random(model.experts)).argmax()
    return labels


def page_labels(model: Geometry, zipf: float, pages: int, given: Assumptions) -> np.ndarray:
    """Return labels [L, N] of `pages` pages, drawn from `label_sample`; -1 in dense layers.

    Each layer has its own order of popularity.
    """
    rng = np.random.default_rng([given.seed, model.layers, model.experts, round(100 * zipf)])
    sample = label_sample(model, zipf, given)
    labels = np.full((model.layers, pages), -1)
    for layer in range(model.dense_layers, model.layers):
        labels[layer] = rng.permutation(model.experts)[rng.choice(sample, pages)]
    return labels


def in_turn(layers: int, pages: int, ranks: int) -> np.ndarray:
    """Return the place [L, N] of pages dealt in turn; layer l begins with place l mod R."""
    return (np.arange(layers)[:, None] + np.arange(pages)) % ranks


def by_xor(labels: np.ndarray, ranks: int) -> np.ndarray:
    """Return the place (n mod R) xor (e mod R) [L, N] of page n of expert e (dense layers: e = 0).

    The map of PiKV (arXiv 2508.06526) with N_tok = N_exp = R, a power of two.
    """
    return (np.arange(labels.shape[1]) % ranks) ^ (labels.clip(0) % ranks)


def by_owner(labels: np.ndarray, experts: int, ranks: int, factor: float) -> np.ndarray:
    """Return the place [L, N] of pages that go to the owner of their expert, one after the other.

    Place (e R // E + l) mod R owns expert e of layer l. If the owner holds max(floor(f m), ceil(m))
    pages already, m = (n + 1) / R after n pages and f = `factor`, the page goes to the place that
    holds fewest. Pages of dense layers are dealt in turn.
    """
    layers, pages = labels.shape
    lanes = np.arange(layers)
    places = in_turn(layers, pages, ranks)
    owner = (labels * ranks // experts + lanes[:, None]) % ranks
    owner = np.where(labels < 0, places, owner)
    loads = np.zeros((layers, ranks), dtype=np.int64)
    for page in range(pages):
        mean = (page + 1) / ranks
        capacity = max(np.floor(factor * mean), np.ceil(mean))
        chosen = owner[:, page].copy()
        full = (loads[lanes, chosen] >= capacity) & (labels[:, page] >= 0)
        if full.any():
            chosen[full] = loads[full].argmin(1)
        loads[lanes, chosen] += 1
        places[:, page] = chosen
    return places


@dataclass(frozen=True)
class Balance:
    """How pages lie on R ranks: `loads` [L, R] pages; `at_home`, the share with their owner."""

    loads: np.ndarray
    at_home: float

    @property
    def per_layer(self) -> float:
        """The most that a rank holds of a layer, by the mean of all ranks; mean over layers.

        The fullest rank is the last to finish a layer.
        """
        return float(np.mean(self.loads.max(1) / np.maximum(self.loads.mean(1), 1e-9)))

    @property
    def over_layers(self) -> float:
        """The most that a rank holds of all layers, by the mean of all ranks."""
        held = self.loads.sum(0)
        return float(held.max() / max(held.mean(), 1e-9))


def balances(
    model: Geometry, zipf: float, ranks: int, lengths: Sequence[int], given: Assumptions
) -> dict[tuple[str, int], Balance]:
    """Return the balance of each placement, after each number of tokens of `lengths`."""
    pages = given.pages(max(lengths))
    labels = page_labels(model, zipf, pages, given)
    dealt = {
        "spread": in_turn(model.layers, pages, ranks),
        "experts": by_owner(labels, model.experts, ranks, given.capacity_factor),
        "pikv_xor": by_xor(labels, ranks),
    }
    owner = (labels * ranks // model.experts + np.arange(model.layers)[:, None]) % ranks
    moe, rows = labels >= 0, np.arange(model.layers)[:, None]
    found = {}
    for name, places in dealt.items():
        for tokens in lengths:
            count = given.pages(tokens)
            slots = (rows * ranks + places[:, :count]).ravel()
            loads = np.bincount(slots, minlength=model.layers * ranks).reshape(-1, ranks)
            at_home = (places == owner)[:, :count][moe[:, :count]].mean() if count else 0.0
            found[name, tokens] = Balance(loads, float(at_home))
    return found


# ---- bytes held, and time -----------------------------------------------------------------------


def bytes_held(model: Geometry, loads: np.ndarray, tokens: int, given: Assumptions) -> float:
    """Return the bytes of keys and values on the fullest rank: pages, tail, sliding layers.

    Positions and labels, which every rank holds, are not counted.
    """
    pages = loads.sum(0).max() * given.page
    tail = (tokens - given.pages(tokens) * given.page) * model.layers
    sliding = min(tokens, model.sliding_window) * model.sliding_layers
    return float(given.batch * (pages + tail + sliding) * model.token_bytes)


def seconds(
    model: Geometry,
    exchange: Exchange,
    ranks: int,
    tokens: int,
    loads: np.ndarray,
    given: Assumptions,
) -> float | None:
    """Return the time of the KV cache in a decode step: reading, sending, and latency, one by one.

    Each layer waits for its fullest rank. Weights, projections, sliding layers and arithmetic are
    not in it, nor that one can be hidden behind another. None = the exchange is not possible.
    """
    sent = exchange.sent(model, ranks, tokens)
    if sent is None:
        return None
    tail = tokens - given.pages(tokens) * given.page
    read = loads.max(1).sum() * given.page + model.layers * tail
    read = model.layers * tokens if exchange.reads_all else read
    launches = model.layers * exchange.collectives * given.latency if ranks > 1 else 0.0
    moved = given.batch * (read * model.token_bytes / given.hbm + sent / given.link)
    return float(moved + launches)


def break_even_tokens(model: Geometry, ranks: int, given: Assumptions) -> float:
    """Return the tokens of a row from which one all-gather is faster than all KV on each rank.

    Solves T b / hbm = ((T - w) / R + w) b / hbm + sent / link + latency / batch for T, per layer: b
    bytes of a token, w tokens in the window.
    """
    sent = sent_all_gather(model, ranks) / model.layers
    wait = given.latency / given.batch + sent / given.link
    return given.window + wait * given.hbm / model.token_bytes / (1 - 1 / ranks)
