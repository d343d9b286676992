"""The report of a cache: numbers counted from the tensors that it holds."""

import io
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..layer.page_experts import pages_per_expert
from ..layer.paged_layer import PagedLayer
from ..storage.memory import storage_bytes, storages, tensors_in
from .paged_cache import PagedCache
from .place_report import PlaceReport, imbalance

HEADINGS = ("layers", "held as", "pages", "tokens\nheld", "MiB", "bytes/\ntoken", "bf16/\nheld")
TIERS = {"device": "on the device", "ram": "in RAM", "disk": "on disk"}
FAR = ("ram", "disk")


@dataclass(frozen=True)
class LayerReport:
    """The numbers of one layer; bytes count all of its rows and KV heads.

    `tokens_held`: tokens of the fullest row and KV head. `tokens_read`: tokens that the newest token
    has read, tail included, the mean of rows and KV heads; `hits` and `misses`: sealed pages of all
    rows and KV heads that it has read from the layer's device, and from elsewhere; `bytes_fetched`:
    the bytes of the misses. If no router has selected pages for it, it has read all. `recall`: mean
    share of attention that fell on what was read, with a router and `probe=True`. `pages_per_expert`:
    full pages by the expert with the largest share in them; None without labels. `bytes_per_token`: bytes for each token of
    a row (mean of the KV heads), tail tokens included. `bf16_ratio`: bytes that all tokens seen
    would take in bfloat16, divided by `nbytes`. `tiers`: bytes of the encoded pages on the layer's
    device ("device"), in CPU memory ("ram") and in files ("disk"); `nbytes` excludes files only.
    `error`: relative error of attention output over sealed tokens; None without `probe=True`.
    `bytes_per_token`, `bf16_ratio` and `error` are None without tokens and in other layers.
    """

    layer: int
    kind: str
    paged: bool
    why: str | None
    pages: int
    tokens_held: int
    nbytes: int
    bytes_per_token: float | None = None
    bf16_ratio: float | None = None
    error: float | None = None
    tiers: dict[str, int] = field(default_factory=dict)
    tokens_read: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    recall: float | None = None
    pages_per_expert: list[int] | None = None


@dataclass(frozen=True)
class Report:
    """The numbers of a cache and of its layers.

    `full_nbytes`: bytes of a full cache: in paged layers all tokens seen in the model's dtype,
    padding included; other layers as they are. `full_bf16_nbytes`: as `full_nbytes`, with paged
    layers in bfloat16. `tiers`: sums over layers. `note`: why the model stopped using the cache.
    `fork_nbytes`: bytes that `cache.fork()` copies; `fork(n)` copies n times as many. `places`: what
    each place holds, if pages are dealt to places; `nbytes` counts what this process holds.
    """

    seen_tokens: int
    nbytes: int
    full_nbytes: int
    full_bf16_nbytes: int
    probe: bool
    settings: dict[str, str]
    tiers: dict[str, int]
    layers: list[LayerReport]
    note: str | None
    fork_nbytes: int
    places: list[PlaceReport]

    @classmethod
    def of(cls, cache: PagedCache) -> "Report":
        why = cache.unpaged
        layers = [_layer_report(idx, layer, why.get(idx)) for idx, layer in enumerate(cache.layers)]
        full, full_bf16 = (sum(_full_nbytes(x, size) for x in cache.layers) for size in (None, 2))
        names = ("scheduler", "budget", "compressor", "router", "placement", "page_size", "window")
        settings = {name: repr(getattr(cache.settings, name)) for name in names}
        for name in ("scheduler", "compressor", "router", "placement"):
            settings[name] = _shown(getattr(cache.settings, name))
        tiers = {name: sum(row.tiers.get(name, 0) for row in layers) for name in TIERS}
        numbers = cache.get_seq_length(), cache_bytes(cache), full, full_bf16, cache.settings.probe
        paged = [state for state in cache.states if state.unpaged_reason is None]
        places = PlaceReport.of(paged)
        return cls(*numbers, settings, tiers, layers, cache.note, fork_bytes(cache), places)

    @property
    def ratio(self) -> float:
        """Bytes of a full cache divided by the bytes held; 1.0 when nothing is held."""
        return self.full_nbytes / self.nbytes if self.nbytes else 1.0

    @property
    def bf16_ratio(self) -> float:
        """Bytes of a full cache in bfloat16 divided by the bytes held; 1.0 when nothing is held."""
        return self.full_bf16_nbytes / self.nbytes if self.nbytes else 1.0

    @property
    def bytes_per_token(self) -> float:
        """Sum of the layers' bytes per token that a row holds."""
        return sum(row.bytes_per_token or 0.0 for row in self.layers)

    @property
    def error(self) -> float | None:
        """Root mean square of the layers' errors; None if there is none."""
        return _rms([row.error for row in self.layers if row.error is not None])

    @property
    def imbalance(self) -> float:
        """Pages of the fullest place over the mean of all places; 1.0 if there is one place."""
        return imbalance(self.places)

    def to_dict(self) -> dict[str, Any]:
        names = ("ratio", "bf16_ratio", "bytes_per_token", "error", "imbalance")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __rich__(self) -> Table:
        title = (
            f"PiKVCache: {self.seen_tokens} tokens seen, {_mib(self.nbytes)} held\n"
            f"a full cache: {_mib(self.full_nbytes)}, {self.ratio:.2f} times as much; "
            f"in bfloat16 {self.bf16_ratio:.2f} times"
        )
        if self.tiers["ram"] or self.tiers["disk"]:
            places = (f"{_mib(self.tiers[name])} {place}" for name, place in TIERS.items())
            title += f"\npages: {', '.join(places)}; files are not counted as held"
        if self.places:
            held = (f"{x.device} {x.pages} pages, {_mib(x.bytes_held)}" for x in self.places)
            sent = sum(place.bytes_sent for place in self.places)
            title += f"\n{'; '.join(held)}\nfullest place {self.imbalance:.2f} times the mean; "
            title += f"{_mib(sent)} sent"
        has_remark = any(row.why for row in self.layers)
        selects = self.settings["router"] not in ("None", "All()")
        has_recall = any(row.recall is not None for row in self.layers)
        optional = (
            ("tokens\nread", selects),
            ("recall", has_recall),
            ("error", self.probe),
            ("remark", has_remark),
        )
        if self.note is not None:
            title += f"\n{self.note}"
        settings = [f"{k}={v}" for k, v in self.settings.items() if v != "None"]
        caption = ", ".join([*settings, f"a fork copies {_mib(self.fork_nbytes)}"])
        headings = (*HEADINGS, *(name for name, shown in optional if shown))
        table = Table(*headings, title=title, caption=caption)
        for _, run in itertools.groupby(self.layers, _alike):
            rows = list(run)
            error = _rms([row.error for row in rows if row.error is not None])
            read = f"{sum(row.tokens_read for row in rows) / len(rows):.0f}"
            recall = _mean([row.recall for row in rows], ".3f")
            cells = read, recall, "-" if error is None else f"{error:.2g}", rows[0].why or ""
            shown = (cell for cell, (_, shown) in zip(cells, optional, strict=True) if shown)
            table.add_row(*_cells(rows), *shown)
        return table

    def __str__(self) -> str:
        return self._written().export_text()

    def _repr_html_(self) -> str:
        return self._written().export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _written(self) -> Console:
        """Return a console that has recorded the table, without displaying it in a notebook."""
        console = Console(record=True, width=110, file=io.StringIO(), force_jupyter=False)
        console.print(self)
        return console


def cache_bytes(cache: PagedCache) -> int:
    """Return the bytes of the distinct storages of all tensors of the cache, without files."""
    return storage_bytes(_cache_tensors(cache))


def fork_bytes(cache: PagedCache) -> int:
    """Return the bytes that `cache.fork()` copies: all but pages and the scheduler's tensors."""
    shared = storages(t for x in cache.states for t in (*x.pages.tensors(), *x.scheduler_tensors()))
    held = storages(_cache_tensors(cache))
    return sum(nbytes for place, nbytes in held.items() if place not in shared)


def _cache_tensors(cache: PagedCache) -> list[Tensor]:
    tensors = [cache.log.ids] if cache.log.ids is not None else []
    tensors += tensors_in({k: v for k, v in vars(cache).items() if k not in ("layers", "log")})
    tensors += [*cache.step.buffer.tensors(), *cache.columns.tensors()]
    for layer in cache.layers:
        tensors += _layer_tensors(layer)
    return tensors


def _cells(rows: list[LayerReport]) -> list[str]:
    """Return the cells of neighbouring layers in the table: the sum of MiB, means of ratios."""
    first, last = rows[0].layer, rows[-1].layer
    return [
        str(first) if first == last else f"{first}-{last}",
        rows[0].kind,
        str(rows[0].pages) if rows[0].paged else "-",
        str(rows[0].tokens_held),
        f"{sum(row.nbytes for row in rows) / 2**20:.2f}",
        _mean([row.bytes_per_token for row in rows], ".1f"),
        _mean([row.bf16_ratio for row in rows], ".2f"),
    ]


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else "-"


def _rms(values: list[float]) -> float | None:
    return (sum(value**2 for value in values) / len(values)) ** 0.5 if values else None


def _layer_report(idx: int, layer: Any, why: str | None) -> LayerReport:
    nbytes = storage_bytes(_layer_tensors(layer))
    if not isinstance(layer, PagedLayer):
        keys = getattr(layer, "keys", None)
        held = keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0
        why = why or "transformers' own layer"
        return LayerReport(idx, type(layer).__name__, False, why, 0, held, nbytes)
    held = layer.state.held_tokens()
    per_token = nbytes / _row_tokens(layer) if held else None
    ratio = _full_nbytes(layer, 2) / nbytes if held else None
    sizes = (held, nbytes, per_token, ratio, layer.state.probe.error)
    if why is not None:
        return LayerReport(idx, "full attention", False, why, 0, *sizes)
    kind = "full attention" if layer.state.latent_rank is None else "latent attention"
    pages = sum(slab.page_count for slab in layer.state.pages.slabs)
    tiers = dict.fromkeys(TIERS, 0)
    for slab in layer.state.pages.slabs:
        if not slab.tier.is_remote:
            tiers[slab.tier.name] += slab.nbytes
    if (router := layer.state.settings.router) is not None:
        is_far = any(tiers[name] for name in FAR)
        why = router.remark(has_gate=layer.state.facts.has_gate, has_far_pages=is_far)
        routing, num_paged = layer.state.routing, layer.state.facts.num_paged
        has_copies = layer.state.settings.placement.copies(num_paged) is not None
        if has_copies and is_far and routing.reads and routing.resident is None:
            why = "no copies on the device: too little room, or pages or rows that differ in size"
    read = _read(layer) if held else {}
    return LayerReport(idx, kind, True, why, pages, *sizes, tiers, **read)


def _read(layer: PagedLayer) -> dict[str, Any]:
    """Return what the newest token has read of a layer that holds tokens, by the report's names."""
    state, routing = layer.state, layer.state.routing
    if routing.reads is None:
        counts = [
            (s.page_count, s.page_count if s.tier.is_far else 0, s.page_bytes)
            for s in state.pages.slabs
        ]
        tokens = _row_tokens(layer) / state.tail.batch
    else:
        counts = [(read.pages, read.misses, read.page_bytes) for read in routing.reads]
        total = sum(read.tokens for read in routing.reads)
        tokens = state.tail.length + total / (state.tail.batch * state.tail.keys.shape[1])
    return {
        "tokens_read": tokens,
        "hits": sum(pages - misses for pages, misses, _ in counts),
        "misses": sum(misses for _, misses, _ in counts),
        "bytes_fetched": sum(misses * nbytes for _, misses, nbytes in counts),
        "recall": routing.recall,
        "pages_per_expert": pages_per_expert(state.pages.slabs),
    }


def _row_tokens(layer: PagedLayer) -> float:
    """Return the number of tokens in all rows together, as the mean of the KV heads."""
    state = layer.state
    batch = state.tail.batch
    held = (state.pages.held(row) for row in range(batch))
    sealed = sum(float(h.double().mean()) for h in held if h is not None)
    return batch * state.tail.length + sealed


def _layer_tensors(layer: Any) -> Iterable[Tensor]:
    return layer.state.tensors() if isinstance(layer, PagedLayer) else tensors_in(vars(layer))


def _full_nbytes(layer: Any, element_size: int | None) -> int:
    """Return the bytes of all tokens seen at `element_size` bytes a number; None = the layer's.

    A layer of transformers counts as it is.
    """
    if not isinstance(layer, PagedLayer):
        return storage_bytes(_layer_tensors(layer))
    if not layer.is_initialized:
        return 0
    keys, values = layer.state.tail.keys, layer.state.tail.values
    numbers = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
    return layer.state.num_seen * numbers * (element_size or keys.element_size())


def _alike(row: LayerReport) -> tuple[Any, ...]:
    """Return what neighbouring layers have in common that share a line of the table."""
    return row.kind, row.why, row.pages, row.tokens_held


def _shown(value: Any) -> str:
    """Return the text of a setting: of a method, only the options that are not its defaults."""
    if not is_dataclass(value):
        return repr(value)
    changed = (
        f"{option.name}={_shown(getattr(value, option.name))}"
        for option in fields(value)
        if option.repr and getattr(value, option.name) != option.default
    )
    return f"{type(value).__name__}({', '.join(changed)})"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
