"""`pikv generate` on the bundled model, and what it says to a user's mistake."""

from pathlib import Path

import pytest
from command_line import pikv
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_hf import LossWarning
from pikv_hf.model import loading
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack


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


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_names_of_a_dtype(name, monkeypatch, prompt):
    class Loaded(Exception):
        pass

    def load(path, dtype, device_map):
        raise Loaded(dtype)

    monkeypatch.setattr(loading, "load", load)
    result = pikv("generate", "--prompt-file", prompt[0], "--dtype", name)
    assert isinstance(result.exception, Loaded) and result.exception.args == ("bfloat16",)
