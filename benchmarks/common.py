"""What the benchmarks share: fair timing, filled caches, and one way to publish a result."""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.paged_layer import PagedLayer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks"


def start(doc: str) -> bool:
    """Read the command line and set up torch; returns whether this is a `--quick` run."""
    return arguments(doc).quick


def arguments(doc: str, **more: dict[str, Any]) -> argparse.Namespace:
    """As `start`, for a command line with `more` arguments: their settings by name."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; writes no JSON")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    return given


@dataclass(frozen=True)
class Timing:
    """Process CPU time of one call, in milliseconds."""

    median: float
    least: float
    mean: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(*(1e3 * f(seconds) for f in (statistics.median, min, statistics.fmean)))


def interleaved(
    steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time every step once a round, in rotating order, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    for number in range(rounds + warmup):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.process_time()
            steps[name]()
            elapsed = time.process_time() - begin
            if number >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


def random_states(
    seed: int, tokens: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normal keys [1, H, tokens, Dk] and values [1, H, tokens, Dv]; `shape` is (H, Dk, Dv)."""
    heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    empty = [torch.empty(1, heads, tokens, dim, dtype=dtype) for dim in (key_dim, value_dim)]
    return empty[0].normal_(generator=generator), empty[1].normal_(generator=generator)


def write(layer: Any, keys: Tensor, values: Tensor) -> None:
    """One prefill write into a cache layer, by its own methods; no attention is computed."""
    layer.update(keys, values)
    if isinstance(layer, PagedLayer):
        assert take_layer() is layer
        layer.finish()


def fill(cache: Any, tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Any:
    """Give every layer `tokens` tokens; equal arguments give equal contents. Returns the cache."""
    for index, layer in enumerate(cache.layers):
        write(layer, *random_states(index, tokens, shape, dtype))
    return cache


@dataclass
class Result:
    """The table of one benchmark, and which of its goals it met."""

    name: str
    claim: str
    setting: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        self.rows.append([f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells])

    def goal(self, text: str, value: float, met: bool) -> None:
        self.goals.append({"goal": text, "value": float(f"{value:.4g}"), "met": bool(met)})

    def publish(self, quick: bool) -> None:
        """Print the table and the goals; a full run is also written to docs/benchmarks."""
        console = Console(width=120)
        table = Table(*self.columns, title=self.claim, caption=self.setting)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for goal in self.goals:
            verdict = "[green]met[/]" if goal["met"] else "[red]MISSED[/]"
            console.print(f"{verdict}: {goal['goal']} (seen {goal['value']})", highlight=False)
        if not quick:
            path = OUT / f"{self.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {
                "command": f"python {Path(sys.argv[0]).resolve().relative_to(ROOT)}"
            } | asdict(self)
            path.write_text(json.dumps(record | {"environment": environment()}, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """The machine (Linux) and the software that a result belongs to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    changed = git("status", "--porcelain", "src", "kernels")
    return {
        "cpu": next(line.split(": ")[1] for line in lines if line.startswith("model name")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def git(*args: str) -> str:
    return subprocess.check_output(["git", "-C", str(ROOT), *args], text=True).strip()
