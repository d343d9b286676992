"""Wheel, sdist and editable install hold both packages; importing is light; torch stays."""

import functools
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_NET = ("--no-index", "--no-build-isolation", "--disable-pip-version-check")
WHERE = "import pikv_hf, pikv_kernels; print(pikv_hf.__file__); print(pikv_kernels.__file__)"


run = functools.partial(subprocess.run, check=False, capture_output=True, text=True)


def python(*args: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What `python *args` prints; `path` comes before the installed packages."""
    env = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    done = run([sys.executable, *map(str, args)], cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    sdist = next(folder.glob("*.tar.gz"))
    python("-m", "pip", "wheel", *NO_NET, "--no-deps", "-w", folder, sdist, cwd=folder)
    return folder


def test_wheel_made_from_the_sdist_is_complete_and_runs(dist: Path, tmp_path: Path):
    wheel = next(dist.glob("*.whl"))
    target = tmp_path / "site"
    python("-m", "pip", "install", *NO_NET, "--no-deps", "--target", target, wheel, cwd=tmp_path)
    for file in python("-c", WHERE, cwd=tmp_path, path=target).split():
        assert Path(file).is_relative_to(target)
    assert "Usage" in python("-m", "pikv_hf", "--help", cwd=tmp_path, path=target)


def test_wheel_holds_the_sources_the_bundled_model_and_nothing_else(dist: Path):
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {
        "pikv_hf",
        "pikv_kernels",
    }
    for file in ("pikv_hf/py.typed", "pikv_kernels/py.typed", "pikv_hf/cache/pikv_cache.py"):
        assert file in names
    assert "pikv_hf/assets/needle_moe/model.safetensors" in names


def test_sdist_holds_the_tests_and_the_licence(dist: Path):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "tests/test_package.py", "kernels/build.toml"} <= names


def test_editable_install_finds_both_source_roots(tmp_path: Path):
    target = tmp_path / "site"
    command = ("-m", "pip", "install", *NO_NET, "--no-deps", "--target", target, "-e", ROOT)
    python(*command, cwd=tmp_path)
    roots = next(target.glob("*.pth")).read_text().split()
    assert [Path(root) for root in roots] == [ROOT / "src", ROOT / "kernels" / "torch-ext"]
    load = f"import site; site.addsitedir({str(target)!r}); {WHERE}"
    for file in python("-c", load, cwd=tmp_path).split():
        assert Path(file).is_relative_to(ROOT)


def test_installing_keeps_every_package_that_is_there(tmp_path: Path):
    """Above all torch: without an index pip can change nothing, and needs nothing."""
    if sys.platform == "linux":
        pytest.importorskip("triton", reason="this environment lacks a dependency")
    report = tmp_path / "report.json"
    command = ("-m", "pip", "install", "--dry-run", *NO_NET, "--report", report, ROOT)
    python(*command, cwd=tmp_path)
    installs = json.loads(report.read_text())["install"]
    assert [package["metadata"]["name"] for package in installs] == ["pikv-hf"]


def test_kernels_is_a_source_root_and_never_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers import Qwen3MoeForCausalLM; import kernels"
    done = run([sys.executable, "-c", code], cwd=ROOT)
    assert "CUDAProperties" not in done.stderr


def test_import_loads_nothing_that_only_extras_or_pictures_need(tmp_path: Path):
    heavy = ("lm_eval", "datasets", "evaluate", "matplotlib", "pandas")
    code = f"import sys, pikv_hf, pikv_hf.commands.app; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code, cwd=tmp_path).strip() == "[]"
