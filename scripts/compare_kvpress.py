"""Do our schedulers keep what kvpress keeps? Random tiny models, the same prompt and budget.

    python scripts/compare_kvpress.py

kvpress needs an older transformers than we do: it gets a virtual environment of its own, in the
user's cache folder, made at the first run. There `kvpress_record.py` notes which tokens every press
keeps; here the same models run with a `PiKVCache` whose open window is what the press protects, and
whose budget is what it kept. Compared are the tokens outside of that window. Exits with 1
if a method that should agree does so for less than 99 % of the tokens of a case.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from kvpress_cases import CASES, ROWS, SMALL, Case, Row
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pikv_hf import SCHEDULERS, PiKVCache
from pikv_hf.cache.from_text import parse_cache
from pikv_hf.model.versions import cache_in, with_cache
from pikv_hf.schedulers import PyramidKV
from pikv_hf.storage.token_table import TokenTable

GOAL = 0.99
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pikv_hf" / "kvpress"
FIXTURE = Path(__file__).parents[1] / "tests" / "data" / "kvpress.safetensors"
TORCH = torch.__version__.partition("+")[0]
REQUIREMENTS = ["kvpress==0.5.5", "transformers==5.2.*", f"torch=={TORCH}"]


def environment(folder: Path) -> Path:
    """The python of an environment with kvpress, made once."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text().split() != REQUIREMENTS:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        done.write_text("\n".join(REQUIREMENTS))
    return python


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@dataclass(frozen=True)
class GivenBudgets(PyramidKV):
    """Layers keep what they are told."""

    tokens: tuple[int, ...] = ()

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        return self.tokens[layer]


def ours(model: PreTrainedModel, case: Case, row: Row, theirs: Tensor) -> Tensor:
    """[L, H, T] bool: what `PiKVCache` keeps with the budget of `theirs` [L, H, T]."""
    length = theirs.shape[2]
    counts = theirs.sum(-1).double().mean(-1).round().long()
    scheduler = parse_cache(f"scheduler={row.scheduler},budget=1").arguments["scheduler"]
    if row.at_layer_budgets:
        scheduler = GivenBudgets(scheduler, tokens=tuple((counts - row.window).tolist()))
    budget, window = round(float(counts.double().mean())), max(row.window, 1)
    found = torch.zeros_like(theirs)
    found[:, :, length - row.window :] = True
    options: dict[str, Any] = {"page_size": 1, "window": window}
    if row.repeats:
        options |= {"sinks": 4, "hold_prompt": True}
    with torch.no_grad(), PiKVCache(model, scheduler=scheduler, budget=budget, **options) as cache:
        # A cache keeps one token in its tail at least; a press need not.
        object.__setattr__(cache.settings, "window", row.window)
        model(case.prompt(), **with_cache(cache))
        if row.repeats:
            cache.compress()
        for kept, layer in zip(found, cache.layers, strict=True):
            for span in map(TokenTable.all_valid, layer.state.pages.spans([0])):
                head, place = span["valid"][0].expand(len(kept), -1).nonzero(as_tuple=True)
                kept[head, span["positions"][0].expand(len(kept), -1)[head, place].long()] = True
    return found


def overlaps(mine: Tensor, theirs: Tensor, window: int) -> Tensor:
    """[L, H]: the share of the kept tokens that both keep; the newest `window` do not count."""
    mine, theirs = (kept[..., : kept.shape[-1] - window] for kept in (mine, theirs))
    most = torch.maximum(mine.sum(-1), theirs.sum(-1))
    return (mine & theirs).sum(-1) / most.clamp(min=1)


@dataclass
class Agreement:
    """Of one row, over its cases."""

    row: Row
    cases: list[float] = field(default_factory=list)
    worst_head: float = 1.0

    def add(self, shares: Tensor) -> None:
        self.cases.append(float(shares.mean()))
        self.worst_head = min(self.worst_head, float(shares.min()))

    @property
    def fails(self) -> bool:
        return not self.row.differs and min(self.cases, default=1.0) < GOAL

    def cells(self) -> list[str]:
        if not self.cases:
            return [self.row.name, "0", "", "", "", f"no scheduler {self.row.method!r} yet"]
        numbers = sum(self.cases) / len(self.cases), min(self.cases), self.worst_head
        verdict = "[red]DISAGREES[/]" if self.fails else "agrees"
        shares = [f"{100 * number:.2f} %" for number in numbers]
        return [self.row.name, str(len(self.cases)), *shares, self.row.differs or verdict]


def compare(folder: Path, rows: list[Row]) -> tuple[list[Agreement], str]:
    """Every row in every case that `folder` has a record of, and what was compared."""
    found = {row.name: Agreement(row) for row in rows}
    error, versions = 0.0, {}
    for case in track(CASES, "PiKVCache", console=Console(stderr=True)):
        recorded, versions = load(folder / f"{case.name}.safetensors")
        model = case.model("sdpa")
        error = max(error, difference(model, case, recorded))
        for row in rows:
            if row.name in recorded and row.method in SCHEDULERS:
                theirs = recorded[row.name].bool()
                shares = overlaps(ours(model, case, row, theirs), theirs, row.window)
                found[row.name].add(shares)
    theirs = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    caption = f"{theirs} against transformers {transformers.__version__}, torch {torch.__version__}"
    return [*found.values()], f"{caption}; keys and values differ by at most {error:.1e}"


def difference(model: PreTrainedModel, case: Case, recorded: dict[str, Tensor]) -> float:
    """How far keys and values of `model` are from those that the presses were given."""
    with torch.no_grad():
        cache = cache_in(model(case.prompt()))
    pairs = [
        (recorded[name][at], getattr(layer, name)[0])
        for name in ("keys", "values")
        for at, layer in enumerate(cache.layers)
    ]
    return max(float((theirs - mine).abs().max()) for theirs, mine in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--row", action="append", help="compare this row only; may be repeated")
    parser.add_argument("--records", type=Path, help="folder of records that were made before")
    parser.add_argument("--write-fixture", action="store_true", help=f"write {FIXTURE.name}, too")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.row or row.name in options.row]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.records or Path(temporary)
        if not options.records:
            recorder = Path(__file__).with_name("kvpress_record.py")
            subprocess.run([environment(CACHE), recorder, folder], check=True)
        if options.write_fixture:
            tensors, versions = load(folder / f"{SMALL.name}.safetensors")
            save_file(tensors, FIXTURE, versions)
        found, caption = compare(folder, rows)
    columns = ("method", "cases", "overlap", "least of a case", "least of a head", "")
    table = Table(*columns, title="Tokens that PiKVCache and kvpress both keep", caption=caption)
    for agreement in found:
        table.add_row(*agreement.cells())
    Console(width=110).print(table)
    return int(any(agreement.fails for agreement in found))


if __name__ == "__main__":
    sys.exit(main())
