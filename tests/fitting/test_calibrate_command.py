"""`pikv calibrate`, and what it says to a user."""

import pytest
from calibrations import needle_text
from command_line import pikv

from pikv_hf.fitting import calibrate as run
from pikv_hf.model.artifact import read_metadata
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack


def test_command(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(needle_text(0, 3))
    path = tmp_path / "new" / "cal.safetensors"
    small = ("--length", "200", "--steps", "2", "--rank", "8", "--method", "distill")
    result = pikv("calibrate", "--text", tmp_path / "a.txt", *small, "--out", path)
    assert result.exit_code == 0, result.output
    assert "distill" in result.stdout and str(path) in result.stdout.replace("\n", "")
    metadata = read_metadata(path)
    assert metadata["model"]["name"] == str(NEEDLE_MODEL)
    assert metadata["job"]["methods"] == ["distill"]
    (tmp_path / "prompt.txt").write_text(make_haystack(length=400, seed=1).prompt())
    option = f"compressor=distill(calibration={str(path)!r})"
    result = pikv("generate", "--prompt-file", tmp_path / "prompt.txt", "--cache", option)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "args, match",
    [
        (("--length", "0"), "`length` is 0; it must be a positive whole number."),
        (("--method", "int8"), "`methods` are ['int8']"),
        (("--length", "4000"), "`length` is 4000"),
        ((), "the texts have fewer than 1154 tokens"),
        (("--text", "/no/text"), "does not exist"),
        (("--text", "BYTES"), "is not UTF-8 text."),
    ],
    ids=str,
)
def test_command_refuses(args, match, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("the magic number .")
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\xfa")
    args = [str(tmp_path / "BYTES") if arg == "BYTES" else arg for arg in args]
    out = tmp_path / "cal.safetensors"
    result = pikv("calibrate", "--text", tmp_path / "a.txt", *args, "--out", out)
    assert result.exit_code == 2 and match in " ".join(result.output.split())
    assert not out.exists()


def test_command_interrupted(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text(needle_text(0, 3))
    path = tmp_path / "cal.safetensors"
    command = ("calibrate", "--text", tmp_path / "a.txt", "--length", "200", "--steps", "2")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", interrupted)
        result = pikv(*command, "--out", path)
    assert result.exit_code == 130 and "the same command goes on" in result.output
    assert pikv(*command, "--out", path).exit_code == 0 and path.exists()


def test_a_cache_without_a_calibration_in_a_command(tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("the magic number .")
    result = pikv(
        "generate", "--prompt-file", tmp_path / "prompt.txt", "--cache", "compressor=lowrank"
    )
    assert result.exit_code == 2 and "lowrank needs a calibration" in result.output
