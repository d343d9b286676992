"""What the design says of the source: who imports whom, file sizes, registries, print; of tests."""

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
TESTS = sorted(file for file in Path(__file__).parent.rglob("*.py") if file.name != "tolerances.py")
MOST_LINES_OF_TESTS = 350

# Folders are floors: a file imports from its own folder and from those on earlier lines.
FLOORS = [
    {"pikv_kernels", "requirements", "validation"},
    {"model"},
    {"storage"},
    {"compressors", "schedulers", "routers", "placements"},
    {"layer"},
    {"attention"},
    {"attach"},
    {"cache"},
    {"needles", "fitting"},
    {"commands"},
    {"__init__", "__main__"},
]

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


def module_of(file: Path) -> str:
    """The full name of the module in `file`; `__init__` stands for a folder."""
    home = SRC.parent if file.is_relative_to(SRC) else KERNELS.parent
    return ".".join(file.relative_to(home).with_suffix("").parts)


MODULES = {module_of(file) for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Modules that `file` imports, by full name: for types, and inside of functions, too."""
    package = module_of(file).split(".")[:-1]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{module}.{alias.name}"
                yield inside if inside in MODULES else module


@functools.cache
def edges() -> dict[str, set[str]]:
    """Module -> the others of ours that it imports."""
    graph = {}
    for file in FILES:
        found = {m if m in MODULES else f"{m}.__init__" for m in imports(file)}
        graph[module_of(file)] = (found & MODULES) - {module_of(file)}
    return graph


def reached(module: str) -> set[str]:
    """All modules that `module` imports, or that these import."""
    found: set[str] = set()
    todo = [module]
    while todo:
        new = edges()[todo.pop()] - found
        found |= new
        todo += new
    return found


def floor_of(module: str) -> int:
    """The number of the floor that `module` is on."""
    top, *rest = module.split(".")
    part = rest[0] if top == "pikv_hf" else top
    return next(number for number, floor in enumerate(FLOORS) if part in floor)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_down(module: str):
    upward = [other for other in edges()[module] if floor_of(other) > floor_of(module)]
    assert not upward


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_in_a_circle(module: str):
    assert module not in reached(module)


STATEFUL = {"cache", "layer", "state", "table", "pages", "tail", "observed", "slab", "pool", "step"}


@each_file([file for file in FILES if file.name != "other_layers.py"])  # of transformers' layers
def test_only_its_own_class_writes_an_attribute_of_a_state(file: Path):
    for node in ast.walk(tree_of(file)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (part for whole in targets for part in getattr(whole, "elts", [whole])):
            if isinstance(target, ast.Attribute):
                *owners, _ = ast.unparse(target).split(".")
                is_own = owners == ["self"]
                assert is_own or not STATEFUL & set(owners), f"line {node.lineno}"


@each_file([file for file in FILES if file.is_relative_to(KERNELS)])
def test_kernels_import_only_torch_triton_and_themselves(file: Path):
    tops = {module.split(".")[0] for module in imports(file)}
    assert tops <= {"pikv_kernels", "torch", "triton"} | sys.stdlib_module_names
    for node in ast.walk(tree_of(file)):
        assert not (isinstance(node, ast.ImportFrom) and "pikv" in str(node.module)), "relatively"


@each_file(FILES)
def test_no_long_files(file: Path):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_no_long_tests():
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in TESTS}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES_OF_TESTS}


def small_bounds(node: ast.AST) -> Iterator[ast.AST]:
    """What `node` compares something with, or gives as its tolerance, if these are small numbers."""
    bounds: list[ast.AST] = []
    if isinstance(node, ast.Call):
        names = ("rel", "abs", "rtol", "atol")
        bounds = [keyword.value for keyword in node.keywords if keyword.arg in names]
    if isinstance(node, ast.Compare):
        bounds = [*node.comparators, node.left]
        bounds += [part for bound in bounds for part in ast.iter_child_nodes(bound)]
    for bound in bounds:
        value = bound.value if isinstance(bound, ast.Constant) else None
        if isinstance(value, float) and 0 < value < 0.005:
            yield bound


def test_tolerances_are_named():
    """They stand in tolerances.py, each with its reason."""
    for file in TESTS:
        for node in ast.walk(tree_of(file)):
            lines = [bound.lineno for bound in small_bounds(node)]
            assert not lines, f"{file.name}, lines {lines}"


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
