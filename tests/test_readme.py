"""What the README shows runs: its Python blocks, its commands, its links."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pikv_hf import PiKVCache
from pikv_hf.commands.app import app
from pikv_hf.model.versions import CACHE
from pikv_hf.needles.haystack import NEEDLE_MODEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINT = "Qwen/Qwen3-30B-A3B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_checkpoint_that_is_replaced_here_is_the_one_named_there():
    assert CHECKPOINT in README


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]):
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(NEEDLE_MODEL)
    inputs = tokenizer("anna found the key .", return_tensors="pt")
    names: dict[str, Any] = {"PiKVCache": PiKVCache, "model": model, "inputs": inputs}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        block = block.replace("cache=cache", f"{CACHE}=cache")  # as older versions call it
        exec(block.replace(CHECKPOINT, str(NEEDLE_MODEL)), names)  # noqa: S102  our own text
        assert isinstance(names["output"], torch.Tensor)
    assert "tokens seen" in capsys.readouterr().out


COMMANDS = [
    line for block in blocks("bash") for line in block.splitlines() if line.startswith("pikv ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: " ".join(line.split()[:2]))
def test_commands_are_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every option and cache of the line is accepted: what fails is the model, which is not here."""
    monkeypatch.chdir(tmp_path)
    Path("question.txt").write_text("anna found the key .")
    arguments = shlex.split(command.replace(CHECKPOINT, "/no/such/model"))[1:]
    result = CliRunner().invoke(app, arguments)
    assert "/no/such/model could not be loaded" in result.stderr


def test_make_has_the_targets_that_are_named():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_to_files_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
