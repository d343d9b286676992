"""What a cache holds, counted from its tensors."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from .layer import PagedLayer

if TYPE_CHECKING:
    from .cache import PiKVCache


@dataclass(frozen=True)
class LayerReport:
    """One layer: tokens are those of the fullest row and KV head; bytes are of all rows and heads."""

    layer: int
    kind: str
    paged: bool
    why: str | None
    pages: int
    held_tokens: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """What a cache holds. `full_nbytes` is what its paged layers would hold of all tokens seen in
    the model's dtype, padding included, plus what the other layers hold: a full cache's bytes."""

    seen_tokens: int
    nbytes: int
    full_nbytes: int
    settings: dict[str, str]
    layers: list[LayerReport]

    @classmethod
    def of(cls, cache: "PiKVCache") -> "Report":
        layers = [_layer_report(idx, layer) for idx, layer in enumerate(cache.layers)]
        full = sum(
            _full_nbytes(layer) if isinstance(layer, PagedLayer) else row.nbytes
            for row, layer in zip(layers, cache.layers, strict=True)
        )
        shared = cache.shared
        names = ("scheduler", "budget", "compressor", "router", "placement", "page_size", "window")
        settings = {name: repr(getattr(shared, name)) for name in names}
        return cls(cache.get_seq_length(), cache.nbytes, full, settings, layers)

    @property
    def ratio(self) -> float:
        """How many times smaller than a full cache; 1.0 when nothing is held."""
        return self.full_nbytes / self.nbytes if self.nbytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}

    def __rich__(self) -> Table:
        title = (
            f"PiKVCache: {self.seen_tokens} tokens seen, {_mib(self.nbytes)} held\n"
            f"a full cache: {_mib(self.full_nbytes)}, {self.ratio:.2f} times as much"
        )
        table = Table("layers", "held as", "pages", "tokens held", "MiB", "remark", title=title)
        for rows in _runs(self.layers):
            first, last = rows[0].layer, rows[-1].layer
            table.add_row(
                str(first) if first == last else f"{first}-{last}",
                rows[0].kind,
                str(rows[0].pages) if rows[0].paged else "-",
                str(rows[0].held_tokens),
                f"{sum(row.nbytes for row in rows) / 2**20:.2f}",
                rows[0].why or "",
            )
        table.caption = ", ".join(f"{k}={v}" for k, v in self.settings.items() if v != "None")
        return table

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _repr_html_(self) -> str:
        console = Console(record=True, width=110, file=None, quiet=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def storage_bytes(cache: "PiKVCache") -> int:
    """Bytes of the distinct storages behind every tensor that the cache refers to."""
    tensors = [cache.log.ids] if cache.log.ids is not None else []
    tensors += _tensors_in({k: v for k, v in vars(cache).items() if k not in ("layers", "log")})
    tensors += cache.shared.scratch.tensors()
    for layer in cache.layers:
        tensors += _layer_tensors(layer)
    return _distinct_bytes(tensors)


def _layer_report(idx: int, layer: Any) -> LayerReport:
    tensors = list(_layer_tensors(layer))
    nbytes = _distinct_bytes(tensors)
    if not isinstance(layer, PagedLayer):
        keys = getattr(layer, "keys", None)
        held = keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0
        why = "transformers' own layer"
        return LayerReport(idx, type(layer).__name__, False, why, 0, held, nbytes)
    if layer.unpaged is not None:
        held = layer.tail.length if layer.is_initialized else 0
        return LayerReport(idx, "full attention", False, layer.unpaged, 0, held, nbytes)
    kind = "full attention" if layer.latent_rank is None else "latent attention"
    pages = sum(slab.page_count for slab in layer.pages.slabs)
    return LayerReport(idx, kind, True, None, pages, layer.held_tokens(), nbytes)


def _layer_tensors(layer: Any) -> Iterator[Tensor]:
    if isinstance(layer, PagedLayer):
        yield from layer.tensors()
    else:
        yield from _tensors_in(vars(layer))


def _full_nbytes(layer: PagedLayer) -> int:
    if not layer.is_initialized:
        return 0
    keys, values = layer.tail.keys, layer.tail.values
    per_token = (keys.shape[3] + values.shape[3]) * keys.element_size()
    return keys.shape[0] * keys.shape[1] * layer.seen * per_token


def _distinct_bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)


def _runs(layers: list[LayerReport]) -> Iterator[list[LayerReport]]:
    """Neighbouring layers that differ in number and bytes only."""
    run: list[LayerReport] = []
    for row in layers:
        same = run and (row.kind, row.why, row.pages, row.held_tokens) == (
            run[-1].kind,
            run[-1].why,
            run[-1].pages,
            run[-1].held_tokens,
        )
        if run and not same:
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
