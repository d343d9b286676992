"""`pikv demo` on the bundled model: what it measures, writes and keeps when interrupted."""

import json
from pathlib import Path

import pytest
import torch
from command_line import SMALL, pikv
from tolerances import SUMS, VISIBLE
from transformers import DynamicCache

from pikv_hf import __version__
from pikv_hf.cache.from_text import parse_cache
from pikv_hf.needles import trials as demo
from pikv_hf.needles.haystack import make_haystack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = pikv(
        "demo", *SMALL, "--out", folder, "--cache", "lossless", "--cache", "compressor=int8"
    )
    assert result.exit_code == 0, result.output
    assert "DynamicCache" in result.stdout
    assert str(folder / "results.json") in result.stdout
    return folder


def test_demo_writes_a_picture(folder: Path):
    picture = (folder / "accuracy_vs_memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_demo_writes_all_that_is_needed_to_read_and_repeat_it(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    assert results["versions"]["pikv_hf"] == __version__
    assert results["versions"]["torch"] == torch.__version__
    job = {"model": "bundled", "length": 384, "needles": 2, "questions": 2, "seed": 0}
    assert job.items() <= results.items()
    assert not results["interrupted"]
    names = [row["cache"] for row in results["caches"]]
    assert names == ["DynamicCache", "PiKVCache()", "PiKVCache(compressor=int8)"]
    assert len(results["trials"]) == 6
    full, lossless, int8 = results["caches"]
    assert full["ratio"] == 1
    assert lossless["exact"] == full["exact"]
    assert int8["nbytes"] < full["nbytes"]
    for row in results["caches"]:
        assert row["first_token_s"] > 0
        assert row["decode_tokens_per_s"] > 0


def test_demo_of_compressors_with_their_error(tmp_path):
    """`--compressor X` is `--cache compressor=X`; `--probe` adds a number and a column."""
    args = ("--compressor", "int8", "--compressor", "int4(rotate=False)", "--cache", "lossless")
    result = pikv("demo", *SMALL, "--out", tmp_path, *args, "--cache", "compressor=int8", "--probe")
    assert result.exit_code == 0, result.output
    assert "error" in result.stdout.split("DynamicCache")[0]
    assert "LossWarning" not in result.output
    rows = json.loads((tmp_path / "results.json").read_text())["caches"]
    names = ["DynamicCache", "PiKVCache()", "PiKVCache(compressor=int8)"]
    assert [row["cache"] for row in rows] == [*names, "PiKVCache(compressor=int4(rotate=False))"]
    full, lossless, int8, int4 = rows
    assert full["error"] is None
    assert lossless["error"] is None or lossless["error"] < SUMS
    assert VISIBLE < int8["error"] < 0.05 < int4["error"]
    assert full["bf16_ratio"] == 0.5  # the bundled model is in float32
    assert full["bytes_per_token"] == full["nbytes"] / (384 - 4 + len_of_steps(tmp_path))
    assert int4["bytes_per_token"] < int8["bytes_per_token"] < lossless["bytes_per_token"]
    assert int8["bf16_ratio"] == pytest.approx(0.5 * full["nbytes"] / int8["nbytes"], rel=0.01)


def len_of_steps(folder: Path) -> int:
    """Reply tokens that were cached: one for each step behind the first token."""
    trials = json.loads((folder / "results.json").read_text())["trials"]
    (steps,) = {len(trial["step_s"]) for trial in trials if trial["cache"] == "DynamicCache"}
    return steps


def test_demo_shows_no_error_unless_asked(folder: Path, tmp_path):
    assert all(
        row["error"] is None for row in json.loads((folder / "results.json").read_text())["caches"]
    )
    result = pikv("demo", *SMALL, "--out", tmp_path, "--compressor", "int8")
    assert "error" not in result.stdout.split("DynamicCache")[0]
    rows = json.loads((tmp_path / "results.json").read_text())["caches"]
    assert [row["cache"] for row in rows] == ["DynamicCache", "PiKVCache(compressor=int8)"]


def test_demo_interrupted_keeps_what_every_cache_has_answered(tmp_path, monkeypatch):
    run = demo.run

    def interrupted(*args):
        for number, trial in enumerate(run(*args)):
            if number == 3:  # in the middle of question 1
                raise KeyboardInterrupt
            yield trial

    monkeypatch.setattr(demo, "run", interrupted)
    result = pikv("demo", *SMALL, "--out", tmp_path, "--cache", "lossless")
    assert result.exit_code == 130
    assert "1 of 2 questions" in result.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["interrupted"]
    assert [row["questions"] for row in results["caches"]] == [1, 1]


def test_demo_interrupted_at_once_has_nothing_to_show(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    result = pikv("demo", *SMALL, "--out", tmp_path)
    assert result.exit_code == 130
    assert "interrupted before" in result.stderr


def test_caches_take_turns_on_each_question(bundled):
    caches = [parse_cache(text) for text in ("dynamic", "lossless")]
    stacks = demo.haystacks(bundled[1], length=128, needles=1, questions=3, seed=1)
    trials = list(demo.run(*bundled, caches, stacks))
    assert [trial.question for trial in trials] == [0, 0, 1, 1, 2, 2]
    firsts = [trial.cache for trial in trials[::2]]
    assert firsts == ["DynamicCache", "PiKVCache()", "DynamicCache"]
    again = [t.reply for t in demo.run(*bundled, caches, stacks)]
    assert again == [t.reply for t in trials]


def test_a_trial_measures_the_cache_that_generate_leaves_behind(bundled):
    model, tokenizer = bundled
    stack = make_haystack(length=256, needles=2, seed=3)
    trial = demo.answer(model, tokenizer, parse_cache("dynamic"), stack)
    config = model.config
    kept = 256 - 4 + len(trial.step_s)  # the prompt and every reply token but the last
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert trial.nbytes == kept * per_token
    assert trial.reply.startswith(trial.answer) == trial.exact


def test_held_bytes_of_a_view_are_those_of_its_storage():
    cache = DynamicCache()
    whole = torch.zeros(1, 2, 100, 8)
    cache.update(whole, whole.clone(), 0)
    cache.layers[0].keys = whole[:, :, -10:]
    assert demo.held_bytes(cache) == 2 * whole.nbytes


def test_attaching_leaves_the_model_as_it_was(bundled):
    model, tokenizer = bundled
    before = {
        name: module.config for name, module in model.named_modules() if hasattr(module, "config")
    }
    stack = make_haystack(length=256, needles=2, seed=3)
    demo.answer(model, tokenizer, parse_cache("compressor=int8"), stack)
    after = {
        name: module.config for name, module in model.named_modules() if hasattr(module, "config")
    }
    assert all(after[name] is config for name, config in before.items())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--cache", "compressor=int9"), "'int9'; it must be one of"),
        (("--cache", "color=red"), "'color' is no option of a cache; it has"),
        (("--cache", "int9"), "'int9' is no method, nor name=value. Did you mean 'int8'"),
        (("--cache", "keydiff"), "'keydiff' needs a budget: add budget=25%"),
        (("--cache", "compresor=int8"), "Did you mean 'compressor'?"),
        (("--cache", "int8,int4"), "'int8,int4' is not name=value"),
        (("--dtype", "int7"), "'int7' is no dtype of weights; it must be one of auto"),
        (("--device-map", "cuda"), "--device-map: 'cuda' cannot be used here"),
        (("--cache", "**x"), "'**x' is not name=value"),
        (("--cache", "compressor=int8,compressor=int8"), "is not name=value"),
        (("--cache", "compressor=3"), "`compressor` is 3"),
        (("--cache", "compressor=a-b"), "`compressor` is a - b"),
        (("--cache", "budget=0.5"), "there is no `scheduler`"),
        (("--cache", "scheduler=streaming_llm,budget=2.0"), "`budget` is 2.0"),
        (("--cache", "scheduler=streaming_llm(sink=1)"), "argument 'sink'"),
        (("--cache", "scheduler=streaming_llm(sinks=-1)"), "`sinks` is -1"),
        (("--cache", "page_size=0"), "`page_size` is 0"),
        (("--compressor", "int9"), "--compressor: `compressor` is 'int9'; it must be one of"),
        (("--compressor", "turboquant(bits=5)"), "`bits` is 5; it must be one of"),
        (("--compressor", "int8,budget=1"), "there is no `scheduler`"),
        (("--model", "/no/such/model"), "--model: /no/such/model could not be loaded"),
        (("--length", "1000000"), "the model reads at most"),
        (("--needles", "60", "--length", "128"), "ask for fewer needles"),
        (("--out", "/dev/null/x"), "--out: /dev/null/x cannot be made"),
    ],
)
def test_demo_says_what_is_wrong_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pikv("demo", *args)
    assert result.exit_code == 2
    if args[0] == "--dtype":  # typer draws a box around it
        assert says in " ".join(result.stderr.replace("│", "").split())
        return
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if "Loading" not in line]) == 1


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path):
    result = pikv("demo", *SMALL, "--out", tmp_path, "--cache", "kvzip,budget=128")
    assert result.exit_code == 0, result.output
    assert "answered 1 of 2 questions" in result.stderr and "answered 2 of 2" in result.stderr
