"""What the design says of the source: who imports whom, file sizes, registries, print."""

import ast
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pikv_hf import COMPRESSORS, PLACEMENTS, ROUTERS, SCHEDULERS

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "pikv_hf"
KERNELS = ROOT / "kernels" / "torch-ext" / "pikv_kernels"
FILES = sorted([*SRC.rglob("*.py"), *KERNELS.rglob("*.py")])
MOST_LINES = 400

# Nothing reaches a later group, not even through a part that is in none of them.
ORDER = [
    {"pikv_kernels"},
    {"compressors", "schedulers", "routers", "placement"},
    {"pages"},
    {"layer"},
    {"attached"},
    {"cache"},
    {"attach", "report", "plot", "options", "demo", "calibrate", "terminal", "integrations", "cli"},
]
# `PiKVCache(model)` and `cache.report()` need later parts: inside functions, and only these.
UPWARD = {("attached", "attach"), ("cache", "report"), ("cache", "plot"), ("report", "plot")}

REGISTRIES = {
    "scheduler": SCHEDULERS,
    "compressor": COMPRESSORS,
    "router": ROUTERS,
    "placement": PLACEMENTS,
}
ENTRIES = [
    pytest.param(name, method, id=f"{kind}-{name}")
    for kind, registry in REGISTRIES.items()
    for name, method in registry.items()
]


def each_file(files: list[Path]) -> pytest.MarkDecorator:
    ids = [str(file.relative_to(ROOT)) for file in files]
    return pytest.mark.parametrize("file", files, ids=ids)


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def part_of(module: str) -> str | None:
    """`pikv_hf.pages` -> pages, `pikv_hf.routers.all` -> routers, `torch.nn` -> None."""
    top, _, rest = module.partition(".")
    if top != "pikv_hf":
        return top if top == "pikv_kernels" else None
    name = rest.split(".")[0]
    return name if (SRC / name).is_dir() or (SRC / f"{name}.py").exists() else "__init__"


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Modules that `file` imports when it runs, by full name, and whether inside a function."""
    home = SRC.parent if file.is_relative_to(SRC) else KERNELS.parent
    package = file.relative_to(home).parts[:-1]

    def names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        base = package[: len(package) + 1 - node.level] if node.level else ()
        if node.module:
            return [".".join([*base, node.module])]
        return [".".join([*base, alias.name]) for alias in node.names]

    def walk(node: ast.AST, in_function: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield from ((name, in_function) for name in names(node))
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function)

    yield from walk(tree_of(file), False)


@functools.cache
def edges(in_function: bool) -> dict[str, set[str]]:
    """Part -> the other parts that it imports at the top of a file, or inside a function."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        name = ".".join(
            file.relative_to(SRC.parent if SRC in file.parents else KERNELS.parent).parts
        )
        part = part_of(name.removesuffix(".py"))
        found = {part_of(m) for m, inside in imports(file) if inside == in_function}
        graph.setdefault(part, set()).update(found - {None, part})
    return graph


def reached(part: str) -> set[str]:
    """All parts that are loaded when `part` is imported (the package's `__init__` apart)."""
    found: set[str] = set()
    todo = [part]
    while todo:
        new = edges(False).get(todo.pop(), set()) - found - {"__init__"}
        found |= new
        todo += new
    return found


@pytest.mark.parametrize("part", sorted(edges(False)))
def test_parts_do_not_import_each_other_in_a_circle(part: str):
    assert part not in reached(part)


@pytest.mark.parametrize("group", range(len(ORDER)))
def test_imports_point_one_way(group: int):
    later = set().union(*ORDER[group + 1 :])
    for part in ORDER[group]:
        assert not reached(part) & later, f"{part} must not import {reached(part) & later}"


def test_imports_in_functions_point_up_only_where_the_design_says():
    upward = {
        (part, target)
        for part, targets in edges(True).items()
        for target in targets
        if part in reached(target)
    }
    assert upward <= UPWARD


@each_file([file for file in FILES if file.is_relative_to(KERNELS)])
def test_kernels_import_only_torch_triton_and_themselves(file: Path):
    tops = {module.split(".")[0] for module, _ in imports(file)}
    assert tops <= {"pikv_kernels", "torch", "triton"} | sys.stdlib_module_names
    for node in ast.walk(tree_of(file)):
        assert not (isinstance(node, ast.ImportFrom) and "pikv" in str(node.module)), "relatively"


@each_file(FILES)
def test_no_long_files(file: Path):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@each_file([file for file in FILES if file.name != "cli.py"])
def test_only_the_command_line_prints(file: Path):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


@pytest.mark.parametrize(("name", "method"), ENTRIES)
def test_methods_are_frozen_dataclasses_with_a_docstring(name: str, method: type):
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen
    assert method.__doc__
    assert not method.__doc__.startswith(f"{method.__name__}("), "made by dataclass"


@pytest.mark.parametrize(("name", "method"), ENTRIES)
def test_methods_have_a_row_in_the_docs(name: str, method: type):
    rows = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    assert any(row.startswith("|") and f"`{name}`" in row.split("|")[1] for row in rows)
