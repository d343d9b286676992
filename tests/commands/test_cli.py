"""`pikv` itself: help, the list of methods, public names, and progress in a file."""

import re
import subprocess
import sys

import pytest
from command_line import pikv

import pikv_hf
from pikv_hf import __version__
from pikv_hf.cache.from_text import METHODS
from pikv_hf.commands.app import COMMANDS, command
from pikv_hf.fitting.calibration_job import METHODS as CALIBRATED
from pikv_hf.fitting.calibration_job import PIKV_QUEST
from pikv_hf.fitting.progress_bar import bar


def test_module_and_command_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "pikv_hf", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"pikv_hf {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_listed_as_it_describes_itself(name):
    assert command(name).help == COMMANDS[name]
    assert pikv(name, "--help").exit_code == 0


def test_help_loads_neither_torch_nor_transformers():
    """Of `pikv`, and of each command: it shows in a moment."""
    code = (
        "import sys; from typer.testing import CliRunner; from pikv_hf.commands.app import app, COMMANDS\n"
        "for args in ([], *([name] for name in COMMANDS)):\n"
        "    print(CliRunner().invoke(app, [*args, '--help']).output)\n"
        "print(*{'torch', 'transformers'} & {*sys.modules}, 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Hide needles" in done.stdout and "pikv methods" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded"


def test_help_names_all_that_can_be_calibrated():
    """It is written out, for the registry would load torch."""
    words = re.findall(r"\w+", pikv("calibrate", "--help").output)
    assert {*CALIBRATED, PIKV_QUEST} <= set(words)


def test_methods_are_listed():
    result = pikv("methods")
    words = result.output.split()
    for registry, _ in METHODS.values():
        assert set(registry) <= set(words)


def test_an_unknown_command_is_a_usage_error():
    result = pikv("generat")
    assert result.exit_code == 2 and "generate" in result.stderr


def test_public_names_are_those_that_are_exported():
    assert {name for name in pikv_hf.__all__ if getattr(pikv_hf, name) is None} == set()
    assert set(pikv_hf.__all__) <= set(dir(pikv_hf))
    for name in ("Unknown", "unknown"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(pikv_hf, name)


def test_classes_of_methods_are_imported_by_name():
    registries = (pikv_hf.COMPRESSORS, pikv_hf.SCHEDULERS, pikv_hf.ROUTERS, pikv_hf.PLACEMENTS)
    for method in (method for registry in registries for method in registry.values()):
        assert getattr(pikv_hf, method.__name__) is method


def test_a_bar_is_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("pikv_hf.fitting.progress_bar.SECONDS", 0.0)
    assert list(bar(range(3), desc="reading")) == [0, 1, 2]
    assert "reading" in capsys.readouterr().err
    monkeypatch.setattr("pikv_hf.fitting.progress_bar.SECONDS", 1000.0)
    assert list(bar(range(3), desc="reading")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
