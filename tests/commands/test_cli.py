"""`pikv demo` and `pikv generate` on the bundled model, and what they say to a user's mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from typer.testing import CliRunner, Result

import pikv_hf
from pikv_hf import LossWarning, PiKVCache, __version__
from pikv_hf.cache.from_text import METHODS, parse_cache
from pikv_hf.commands.app import COMMANDS, app, command
from pikv_hf.compressors import Int8
from pikv_hf.fitting.calibration_job import METHODS as CALIBRATED
from pikv_hf.fitting.calibration_job import PIKV_QUEST
from pikv_hf.fitting.progress_bar import bar
from pikv_hf.model import loading
from pikv_hf.needles import trials as demo
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack
from pikv_hf.placements import Offload
from pikv_hf.schedulers import AdaKV, KeyDiff, KVzip, PyramidKV, StreamingLLM

SMALL = ("--length", "384", "--needles", "2", "--questions", "2")


def pikv(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


@pytest.fixture(scope="module")
def bundled():
    return loading.load(str(NEEDLE_MODEL))


# ---- demo ---------------------------------------------------------------------------------------


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
    assert lossless["error"] is None or lossless["error"] < 1e-5
    assert 1e-3 < int8["error"] < 0.05 < int4["error"]
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


# ---- generate -----------------------------------------------------------------------------------


@pytest.fixture
def prompt(tmp_path: Path) -> tuple[Path, str]:
    stack = make_haystack(length=400, needles=2, seed=5)
    path = tmp_path / "prompt.txt"
    path.write_text(stack.prompt())
    return path, stack.answers[0]


@pytest.mark.parametrize("cache", ["lossless", "compressor=int8"])
def test_generate_answers_and_reports(prompt, cache):
    result = pikv("generate", "--prompt-file", prompt[0], "--cache", cache)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(prompt[1])
    assert "tokens seen" in result.stdout
    assert "full attention" in result.stdout


def test_generate_with_a_compressor_warns_and_measures(prompt):
    args = ("--compressor", "int2", "--max-new-tokens", "2", "--probe")
    with pytest.warns(LossWarning, match="layer 0: int2 changes"):
        result = pikv("generate", "--prompt-file", prompt[0], *args)
    assert result.exit_code == 0, result.output
    assert "compressor=Int2(" in result.stdout
    assert "error" in result.stdout


def test_generate_reads_standard_input_and_knows_the_baseline(prompt):
    args = ("generate", "--prompt-file", "-", "--cache", "dynamic", "--max-new-tokens", "2")
    result = pikv(*args, stdin=prompt[0].read_text())
    assert result.stdout.startswith(prompt[1])
    assert "DynamicCache: 397 tokens seen" in result.stdout


def test_generate_applies_the_chat_template(tmp_path, prompt):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(NEEDLE_MODEL),
        AutoTokenizer.from_pretrained(NEEDLE_MODEL),
    )
    tokenizer.chat_template = "anna and {{ messages[0].content }}"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    args = ("generate", "--model", tmp_path / "chat", "--prompt-file", prompt[0], "--chat")
    result = pikv(*args, "--cache", "dynamic", "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    assert "DynamicCache: 399 tokens seen" in result.stdout


# ---- the text of --cache ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "label"),
    [
        ("dynamic", None, "DynamicCache"),
        ("lossless", {}, "PiKVCache, lossless"),
        ("compressor=int8", {"compressor": Int8()}, "int8"),
        (
            " scheduler=streaming_llm, budget=0.25,compressor='int8' ",
            {"scheduler": StreamingLLM(), "budget": 0.25, "compressor": Int8()},
            "streaming_llm, budget=0.25, 'int8'",
        ),
        (
            "scheduler=streaming_llm(sinks=8, window=56),page_size=16",
            {"scheduler": StreamingLLM(sinks=8, window=56), "page_size": 16},
            "streaming_llm(sinks=8, window=56), page_size=16",
        ),
        ("int8", {"compressor": Int8()}, "int8"),
        ("keydiff,budget=25%", {"scheduler": KeyDiff(), "budget": 0.25}, "keydiff, budget=0.25"),
        (
            "scheduler=keydiff,budget=2GiB",
            {"scheduler": KeyDiff(), "budget": "2GiB"},
            "keydiff, budget='2GiB'",
        ),
        (
            "PyramidKV(AdaKV(KeyDiff())), budget=12.5 %",
            {"scheduler": PyramidKV(AdaKV(KeyDiff())), "budget": 0.125},
            "PyramidKV(AdaKV(KeyDiff())), budget=0.125",
        ),
        (
            "int8(rotate=true),hold_prompt=false,router=none",
            {"compressor": Int8(rotate=True), "hold_prompt": False, "router": None},
            "int8(rotate=true), hold_prompt=false, none",
        ),
        (
            "kvzip,budget=64",
            {"scheduler": KVzip(), "budget": 64, "hold_prompt": True},
            "kvzip, budget=64",
        ),
        (
            "offload(device_bytes=1GiB, ram_bytes=2 GiB, offload_folder='/tmp')",
            {"placement": Offload("1GiB", "2 GiB", "/tmp")},
            "offload(device_bytes='1GiB', ram_bytes='2 GiB', offload_folder='/tmp')",
        ),
    ],
)
def test_text_of_a_cache(text, arguments, label):
    option = parse_cache(text)
    assert option.arguments == arguments
    assert option.label == label


def test_cache_is_made_with_its_arguments(bundled):
    cache = parse_cache("compressor=int8,page_size=32").make(bundled[0])
    assert isinstance(cache, PiKVCache)
    assert cache.settings.compressor == Int8()
    assert cache.settings.page_size == 32


# ---- mistakes -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("content", "args", "says"),
    [
        (b"", (), "--prompt-file is empty"),
        (b"\xff\xfe", (), "not UTF-8"),
        (b"the cat waits .", ("--chat",), "no chat template"),
        (b"the cat waits .", ("--cache", "router=nope"), "`router` is 'nope'"),
        (b"the cat", ("--cache", "lossless", "--compressor", "int8"), "only one of them"),
    ],
)
def test_generate_says_what_is_wrong_in_one_sentence(content, args, says, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    result = pikv("generate", "--prompt-file", path, *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_missing_prompt_file_is_a_usage_error():
    assert pikv("generate", "--prompt-file", "/no/such/file").exit_code == 2


def test_module_and_command_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "pikv_hf", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"pikv_hf {__version__}"


# ---- help, and what is shown in a file ----------------------------------------------------------


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


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_names_of_a_dtype(name, monkeypatch, prompt):
    class Loaded(Exception):
        pass

    def load(path, dtype, device_map):
        raise Loaded(dtype)

    monkeypatch.setattr(loading, "load", load)
    result = pikv("generate", "--prompt-file", prompt[0], "--dtype", name)
    assert isinstance(result.exception, Loaded) and result.exception.args == ("bfloat16",)


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path):
    result = pikv("demo", *SMALL, "--out", tmp_path, "--cache", "kvzip,budget=128")
    assert result.exit_code == 0, result.output
    assert "answered 1 of 2 questions" in result.stderr and "answered 2 of 2" in result.stderr


def test_a_bar_is_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("pikv_hf.fitting.progress_bar.SECONDS", 0.0)
    assert list(bar(range(3), desc="reading")) == [0, 1, 2]
    assert "reading" in capsys.readouterr().err
    monkeypatch.setattr("pikv_hf.fitting.progress_bar.SECONDS", 1000.0)
    assert list(bar(range(3), desc="reading")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
