"""Simulate a KV cache that is spread over 1 to 64 ranks: python scripts/simulate_sharding.py

Nothing is measured: bytes are formulas, the balance of placements is simulated page by page, and
times follow from assumed speeds, which the output names. Writes docs/sharding.png and
docs/benchmarks/sharding_simulated.json; `sharding_model.py` has the formulas and their sources.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from draw_sharding import RANKS, TOKENS, bytes_text, draw, ms_text, tokens_text
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sharding_model import (
    EXCHANGES,
    GEOMETRIES,
    PLACEMENTS,
    Assumptions,
    Balance,
    Geometry,
    balances,
    break_even_tokens,
    bytes_held,
    moved_in_one_process,
    seconds,
)

ROOT = Path(__file__).resolve().parents[1]
K, M = 1024, 1024**2


@dataclass(frozen=True)
class Grid:
    """The cases: numbers of ranks, tokens of a row, and Zipf exponents of expert popularity."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    tokens: tuple[int, ...] = (8 * K, 32 * K, 128 * K, 512 * K, M)
    zipf: tuple[float, ...] = (0.0, 0.5, 1.0)


QUICK = Grid(ranks=(1, 2, 8), tokens=(8 * K, 128 * K))


@dataclass
class Rows:
    """A table of results: one dict a row."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **cells: Any) -> None:
        self.rows.append(cells)

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the rows whose cells equal all of `wanted`."""
        return [row for row in self.rows if wanted.items() <= row.items()]

    def cell(self, name: str, **wanted: Any) -> Any:
        """Return the cell `name` of the only row that equals `wanted`."""
        (row,) = self.where(**wanted)
        return row[name]


@dataclass
class Simulation:
    """The results of all cases of `grid` under the assumptions `given`."""

    grid: Grid
    given: Assumptions
    placed: Rows = field(default_factory=Rows)
    sent: Rows = field(default_factory=Rows)
    time: Rows = field(default_factory=Rows)
    break_even: Rows = field(default_factory=Rows)

    def run(self) -> None:
        """Fill the tables."""
        cases = [(model, ranks) for model in GEOMETRIES for ranks in self.grid.ranks]
        for model, ranks in track(cases, "page by page", console=Console(stderr=True)):
            for zipf in self.grid.zipf:
                found = balances(model, zipf, ranks, self.grid.tokens, self.given)
                self._add_placed(model, zipf, ranks, found)
            for tokens in self.grid.tokens:
                self._add_times(model, ranks, tokens, found["spread", tokens])
            if ranks > 1:
                count = break_even_tokens(model, ranks, self.given)
                self.break_even.add(model=model.name, ranks=ranks, tokens=round(count))
        for model in GEOMETRIES:
            for ranks in self.grid.ranks:
                self._add_sent(model, ranks)

    def _add_placed(
        self, model: Geometry, zipf: float, ranks: int, found: dict[tuple[str, int], Balance]
    ) -> None:
        for (placement, tokens), balance in found.items():
            self.placed.add(
                model=model.name,
                ranks=ranks,
                zipf=zipf,
                placement=placement,
                tokens=tokens,
                per_layer=round(balance.per_layer, 4),
                over_layers=round(balance.over_layers, 4),
                at_home=round(balance.at_home, 4),
                held=round(bytes_held(model, balance.loads, tokens, self.given)),
            )

    def _add_times(self, model: Geometry, ranks: int, tokens: int, spread: Balance) -> None:
        for exchange in EXCHANGES:
            time = seconds(model, exchange, ranks, tokens, spread.loads, self.given)
            ms = None if time is None else float(f"{1e3 * time:.4g}")
            self.time.add(
                model=model.name, ranks=ranks, tokens=tokens, exchange=exchange.name, ms=ms
            )

    def _add_sent(self, model: Geometry, ranks: int) -> None:
        for exchange in EXCHANGES:
            count = exchange.sent(model, ranks, TOKENS)
            count = None if count is None else round(count)
            self.sent.add(model=model.name, ranks=ranks, exchange=exchange.name, bytes=count)
        moved = round(moved_in_one_process(model, ranks))
        self.sent.add(model=model.name, ranks=ranks, exchange="in one process", bytes=moved)

    def record(self) -> dict[str, Any]:
        """Return everything as data for JSON."""
        return {
            "command": "python scripts/simulate_sharding.py",
            "claim": "Simulated, not measured: a KV cache spread over ranks",
            "setting": f"bytes sent are of one row and, where KV is gathered, {TOKENS} tokens; "
            "held is in bytes, on the fullest rank; per_layer and over_layers are maximum / mean",
            "assumptions": asdict(self.given),
            "geometries": [asdict(model) for model in GEOMETRIES],
            "placed": self.placed.rows,
            "sent": self.sent.rows,
            "time": self.time.rows,
            "break_even": self.break_even.rows,
        }


def held_table(done: Simulation) -> Table:
    title = f"1. KV of the fullest rank, placement 'spread', {tokens_text(TOKENS)} tokens a row"
    table = Table("model", *(f"R = {ranks}" for ranks in done.grid.ranks), title=title)
    for model in GEOMETRIES:
        wanted = {"model": model.name, "placement": "spread", "tokens": TOKENS, "zipf": 0.0}
        cells = [done.placed.cell("held", ranks=ranks, **wanted) for ranks in done.grid.ranks]
        table.add_row(model.name, *map(bytes_text, cells))
    return table


def sent_table(done: Simulation) -> Table:
    names = [*(exchange.name for exchange in EXCHANGES[1:]), "in one process"]
    title = f"2. Bytes that a rank sends in a decode step, one row ({tokens_text(TOKENS)} tokens)"
    caption = "in one process: over all links together"
    table = Table("model", "R", *names, title=title, caption=caption)
    for model in GEOMETRIES:
        for ranks in done.grid.ranks[1:]:
            wanted = {"model": model.name, "ranks": ranks}
            cells = [done.sent.cell("bytes", exchange=name, **wanted) for name in names]
            table.add_row(model.name, str(ranks), *map(bytes_text, cells))
    return table


def balance_table(done: Simulation) -> Table:
    title = f"3. Pages of the fullest of {RANKS} ranks / mean: in a layer, over all layers"
    caption = "at home: share of pages on the rank that owns their most frequent expert"
    columns = [tokens_text(n) for n in done.grid.tokens if n <= TOKENS]
    headings = ["model", "placement", "Zipf", *columns, f"at home, {tokens_text(TOKENS)}"]
    table = Table(*headings, title=title, caption=caption)
    for model in GEOMETRIES:
        for placement in PLACEMENTS:
            for zipf in done.grid.zipf:
                rows = done.placed.where(
                    model=model.name, placement=placement, zipf=zipf, ranks=RANKS
                )
                rows = [row for row in rows if row["tokens"] <= TOKENS]
                cells = [f"{row['per_layer']:.2f}, {row['over_layers']:.2f}" for row in rows]
                home = f"{100 * rows[-1]['at_home']:.0f} %"
                table.add_row(model.name, placement, f"{zipf:g}", *cells, home)
    return table


def time_table(done: Simulation) -> Table:
    names = [exchange.name for exchange in EXCHANGES]
    title = f"4. ASSUMED ms for the KV cache in a decode step, {RANKS} ranks, 'spread'"
    table = Table("model", "tokens", *names, title=title)
    for model in GEOMETRIES:
        for tokens in done.grid.tokens:
            rows = done.time.where(model=model.name, tokens=tokens, ranks=RANKS)
            table.add_row(model.name, tokens_text(tokens), *(ms_text(row["ms"]) for row in rows))
    return table


def break_even_table(done: Simulation) -> Table:
    title = "5. ASSUMED tokens from which one all-gather is faster than all KV on each rank"
    table = Table("model", *(f"R = {ranks}" for ranks in done.grid.ranks[1:]), title=title)
    for model in GEOMETRIES:
        rows = done.break_even.where(model=model.name)
        table.add_row(model.name, *(f"{row['tokens'] / K:.3g}k" for row in rows))
    return table


def write(record: dict[str, Any], path: Path) -> None:
    """Write `record` as JSON; a table has its columns once, and one row a line."""
    parts = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list):
            rows = ",\n".join(f"   {json.dumps(list(row.values()))}" for row in value)
            text = f'{{"columns": {json.dumps(list(value[0]))}, "rows": [\n{rows}\n ]}}'
        parts.append(f' "{name}": {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases; writes no file.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the picture.")] = ROOT / "docs",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    hbm: Annotated[float, typer.Option(help="ASSUMED TB/s that a rank reads.")] = 3.0,
    link: Annotated[float, typer.Option(help="ASSUMED GB/s that a rank sends.")] = 50.0,
    latency: Annotated[float, typer.Option(help="ASSUMED microseconds of a collective.")] = 15.0,
    capacity_factor: Annotated[float, typer.Option(min=1.0, help="Of 'experts'.")] = 1.1,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
) -> None:
    """Simulate a KV cache that is spread over ranks. Nothing is measured."""
    given = Assumptions(
        batch=batch,
        hbm=hbm * 1e12,
        link=link * 1e9,
        latency=latency * 1e-6,
        capacity_factor=capacity_factor,
        sampled_pages=128 if quick else 1024,
        seed=seed,
    )
    done = Simulation(QUICK if quick else Grid(), given)
    done.run()
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"[bold]ASSUMPTIONS[/] (nothing is measured on a GPU): a rank reads {hbm:g} TB/s and "
        f"sends {link:g} GB/s, a collective costs {latency:g} us beside its bytes, batch {batch}, "
        f"pages of {given.page} tokens, {given.window} newest tokens on every rank, KV in "
        f"bfloat16, capacity factor {capacity_factor:g}, tokens choose experts independently, "
        f"seed {seed}.",
        highlight=False,
    )
    for table in (held_table, sent_table, balance_table, time_table, break_even_table):
        console.print(table(done))
    if not quick:
        write(done.record(), out / "benchmarks" / "sharding_simulated.json")
        draw(done.record(), out / "sharding.png")


if __name__ == "__main__":
    typer.run(main)
