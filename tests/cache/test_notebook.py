"""What a notebook shows of a cache, run by a kernel."""

import re
from html import unescape

import nbformat
import pytest
from nbclient import NotebookClient

# A cache of a config: the kernel takes long enough without a model.
SETUP = """
from transformers import MixtralConfig
from pikv_hf import PiKVCache
cache = PiKVCache(config=MixtralConfig(num_hidden_layers=3))
"""


@pytest.fixture(scope="module")
def outputs() -> list[list[nbformat.NotebookNode]]:
    """What each cell behind the first one has put out."""
    sources = [SETUP, "cache.report()", "cache", "print(cache.report())"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells[1:]]


def test_print_gives_plain_text(outputs) -> None:
    (output,) = outputs[2]
    assert re.search(r"0-2 .* DynamicLayer .* transformers' own layer", output["text"])
    assert "\x1b" not in output["text"]


@pytest.mark.parametrize("cell", [0, 1], ids=["report", "cache"])
def test_the_last_line_of_a_cell_shows_the_same_table(outputs, cell) -> None:
    (output,), (printed,) = outputs[cell], outputs[2]
    shown = unescape(re.sub("<[^>]*>", "", output["data"]["text/html"]))
    assert shown.split() == printed["text"].split()
