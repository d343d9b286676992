"""Run a part of the tests on several versions of transformers and torch, and print a table.

    make compat                                   # all versions of the table
    make compat ARGS="transformers==5.17.0"       # one; further ones may follow
    make compat ARGS="torch==2.11.0,triton==3.6.0"  # packages that go together

Every package is installed into a folder of its own beside the installed ones, with the dependencies
that differ; nothing that is installed changes. With `--write` the table replaces the one in
docs/compatibility.md.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".compat"
DOC = ROOT / "docs" / "compatibility.md"
# What shows that a version works: every model family, every mode of `generate`, every scheduler,
# wrong use, and what the README shows.
TESTS = (
    *("model/test_versions.py", "test_architectures.py", "cache/test_generate_modes.py"),
    *("cache/test_generate_again.py", "cache/test_generate_around.py"),
    *("cache/test_bad_input.py", "cache/test_bad_arguments.py"),
    *("schedulers/test_schedulers.py", "test_readme.py"),
)
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-m",
    "not slow",
    "-n",
    "auto",
    "--maxprocesses",
    "8",
    "--dist",
    "worksteal",
)
NEWEST = "transformers"  # as pip finds it
VERSIONS = (
    *("transformers==5.17.0", "transformers==5.20.2", "transformers==5.23.0"),
    *("transformers==5.24.0", NEWEST),
)


class Row(NamedTuple):
    """Results of one set of packages."""

    packages: str
    passed: int
    skipped: int
    failed: int
    minutes: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="requirements, by commas")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files in tests/, or options")
    parser.add_argument("--write", action="store_true", help=f"write {DOC.relative_to(ROOT)}")
    options = parser.parse_args()
    rows: list[Row] = []
    for version in options.versions:
        packages = installed(version)
        if packages not in [row.packages for row in rows]:  # the newest may be one of the others
            rows.append(run(version, packages, options.tests))
    table = "\n".join(lines(rows))
    Console().print(f"\n{table}\n", markup=False)
    if options.write:
        text = DOC.read_text(encoding="utf-8")
        DOC.write_text(
            re.sub(r"^\|.*\|$\n?(^\|.*\|$\n?)*", table + "\n", text, count=1, flags=re.MULTILINE)
        )
    return int(any(row.failed or not row.passed for row in rows))


def folder_of(version: str) -> Path:
    return FOLDER / re.sub(r"[^\w.=]+", "-", version)


def installed(version: str) -> str:
    """Install the packages of `version`, and return what the tests are run with."""
    folder = folder_of(version)
    install(version.split(","), folder)
    names = {canonicalize_name(Requirement(text).name) for text in ("torch", *version.split(","))}
    names.add("transformers")
    return ", ".join(f"{name} {found(folder)[name].version}" for name in sorted(names))


def run(version: str, packages: str, tests: Iterable[str]) -> Row:
    """Run the tests with the packages of `version`."""
    folder = folder_of(version)
    report, start = folder / "results.xml", time.monotonic()
    files = [f"tests/{test}" if test.endswith(".py") else test for test in tests]
    subprocess.run(
        [*PYTEST, f"--junitxml={report}", *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder)},
        check=False,
    )
    suite = xml.etree.ElementTree.parse(report).getroot()[0]
    total, skipped, failed, errors = (
        int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")
    )
    bad, minutes = failed + errors, (time.monotonic() - start) / 60
    return Row(packages, total - skipped - bad, skipped, bad, minutes)


def install(wanted: list[str], folder: Path) -> None:
    """Put `wanted` into `folder`, and what they need where the installed version does not do."""
    todo = [Requirement(text) for text in wanted]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        here = {canonicalize_name(d.name): d for d in distributions(path=[str(folder)])}
        known = found(folder).get(name)
        is_newest = not requirement.specifier and requirement.name == NEWEST and name not in here
        if known is None or is_newest or not requirement.specifier.contains(known.version, True):
            command = (
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--upgrade",
                "--target",
                folder,
            )
            subprocess.run([sys.executable, *map(str, command), str(requirement)], check=True)
            todo += needs(found(folder)[name])


def found(folder: Path) -> dict[str, Distribution]:
    """What Python finds, by name, with `folder` before all else."""
    paths = [str(folder), *sys.path]
    return {canonicalize_name(d.name): d for d in reversed([*distributions(path=paths)])}


def needs(distribution: Distribution) -> Iterator[Requirement]:
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def lines(rows: Iterable[Row]) -> Iterator[str]:
    yield "| packages | passed | skipped | failed | minutes |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield f"| {row.packages} | {row.passed} | {row.skipped} | {row.failed} | {row.minutes:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
