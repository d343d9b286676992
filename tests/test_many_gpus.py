"""What docs/many_gpus.md prints: its numbers come from the script, its configuration exists."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
from draw_sharding import RANKS, TOKENS, bytes_text
from sharding_model import GEOMETRIES
from transformers.distributed import DistributedConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "many_gpus.md").read_text(encoding="utf-8")
RECORD = json.loads((DOCS / "benchmarks" / "sharding_simulated.json").read_text())


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def rows(table: str, **wanted: object) -> list[dict[str, object]]:
    """The rows of a table of the JSON file whose cells equal all of `wanted`."""
    columns = RECORD[table]["columns"]
    found = [dict(zip(columns, row, strict=True)) for row in RECORD[table]["rows"]]
    return [row for row in found if wanted.items() <= row.items()]


@pytest.mark.parametrize("model", [model.name for model in GEOMETRIES])
def test_bytes_are_those_that_the_script_wrote(model: str):
    wanted = {"model": model, "zipf": 0.0, "placement": "spread", "tokens": TOKENS}
    held = [rows("placed", ranks=ranks, **wanted)[0]["held"] for ranks in (1, RANKS)]
    names = ("one all-gather (PiKVCache)", "gather KV")
    sent = [rows("sent", model=model, ranks=RANKS, exchange=name)[0]["bytes"] for name in names]
    cells = " | ".join([model, *map(bytes_text, [*held, *sent])])
    assert f"| {cells} |" in PAGE


def test_break_even_and_balance_are_those_that_the_script_wrote():
    for model, count in (("Qwen3-30B-A3B", 29), ("Mixtral-8x7B", 15), ("DeepSeek-V3", 71)):
        (row,) = rows("break_even", model=model, ranks=RANKS)
        assert round(row["tokens"] / 1024) == count
        assert f"from {count}k" in PAGE
    for placement, tokens, most in (
        ("experts", None, "1.10"),
        ("pikv_xor", 8192, "1.45"),
        ("pikv_xor", TOKENS, "1.10"),
    ):
        wanted = {"placement": placement, "ranks": RANKS} | ({"tokens": tokens} if tokens else {})
        found = max(row["per_layer"] for row in rows("placed", **wanted))
        assert found <= float(most)
        assert most in PAGE
    for zipf, share in ((0.0, "95 %"), (1.0, "14 %")):
        wanted = {"placement": "experts", "ranks": RANKS, "tokens": TOKENS, "zipf": zipf}
        shares = {f"{100 * row['at_home']:.0f} %" for row in rows("placed", **wanted)}
        assert shares == {share}


def test_python_blocks_are_python():
    assert len(blocks()) == 4
    for block in blocks():
        ast.parse(block)


@pytest.mark.skipif(
    "ep_size" not in {field.name for field in dataclasses.fields(DistributedConfig)},
    reason="this version of transformers has no `ep_size`",
)
def test_the_configuration_can_be_made_as_printed():
    (script,) = [block for block in blocks() if "DistributedConfig(" in block]
    made = re.search(r"^whole = .*?^config = .*?$", script, re.MULTILINE | re.DOTALL)
    names = {"DistributedConfig": DistributedConfig, "ranks": 8}
    exec(made.group(), names)  # noqa: S102  our own text
    config = names["config"]
    assert (config.tp_size, config.ep_size) == (8, 8)
    assert set(config.tp_plan.values()) == {"replicate"}


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGE):
        assert (DOCS / target).exists(), target
