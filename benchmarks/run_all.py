"""Run all CPU benchmarks, one process after the other, and write docs/benchmarks/README.md."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import OUT

HERE = Path(__file__).resolve().parent
SCRIPTS = [
    "dtypes_cpu",
    "decode_cpu",
    "mla_cpu",
    "append_cpu",
    "dispatch_cpu",
    "memory_cpu",
    "beams_cpu",
    "compressors_cpu",
    "quality_cpu",
    "lowrank_cpu",
    "schedulers_cpu",
    "eviction_cpu",
    "experts_cpu",
    "duo_cpu",
    "quest_cpu",
    "routed_cpu",
    "routers_cpu",
    "offload_cpu",
    "places_cpu",
    "launches/steps",
    "launches/growth",
    "launches/moved",
    "launches/chunks",
    "launches/addresses",
]
INTRO = """# CPU benchmarks

Written by `python benchmarks/run_all.py`; do not edit. Every ratio compares two caches in the same
process and in interleaved rounds, by process CPU time. Other processes may have run beside it.
The scripts of `launches/` time nothing: they count what an accelerator would be asked to do.
"""


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(cells) + "|" for cells in lines)


def section(result: dict[str, Any]) -> str:
    """One benchmark as markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    goals = "\n".join(
        f"- {'met' if goal['met'] else '**missed**'}: {goal['goal']} (seen {goal['value']})"
        for goal in result["goals"]
    )
    parts = [
        f"## {result['claim']}",
        f"`{result['command']}`",
        table(result["columns"], result["rows"]),
        f"{result['setting']}.",
        goals,
        f"Machine: {machine}.",
    ]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; writes nothing")
    parser.add_argument("--write", action="store_true", help="only write, from the JSON files")
    arguments = parser.parse_args()
    if not arguments.write:
        for name in SCRIPTS:
            command = [sys.executable, str(HERE / f"{name}.py")]
            subprocess.run(command + ["--quick"] * arguments.quick, check=True)
    if not arguments.quick:
        paths = [OUT / f"{name}.json" for name in SCRIPTS]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        text = "\n\n".join([INTRO.rstrip(), *map(section, results)]) + "\n"
        (OUT / "README.md").write_text(text)


if __name__ == "__main__":
    main()
