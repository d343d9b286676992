"""A call of `calibrate`: what it reads, what it writes, how it goes on when interrupted."""

import pytest
import torch
from calibrations import TINY, made, needle_text, pieces_of
from helpers import tiny
from zoo import build

from pikv_hf.fitting import calibrate as run
from pikv_hf.fitting import capture
from pikv_hf.fitting.calibrate import calibrate, text_pieces
from pikv_hf.fitting.calibration_job import METHODS, Job

# ---- what is written, and when it is interrupted ------------------------------------------------


def test_the_same_call_writes_the_same_file(tmp_path) -> None:
    model = tiny("mixtral")
    (tmp_path / "again").mkdir()
    files = [made(model, tmp_path), made(model, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loaded_file_is_what_was_fitted(tmp_path) -> None:
    model = tiny("mixtral")
    path = tmp_path / "cal.safetensors"
    fits = calibrate(model, pieces_of(model, 6), path, TINY)
    for name, layers in fits.items():
        for idx, found in layers.items():
            bound = METHODS[name](calibration=path).bind(model.config, idx)
            assert bound._factors.keys() == found.factors.keys() and bound._factors
            assert all(torch.equal(bound._factors[k], t) for k, t in found.factors.items())


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_interrupted_while_reading(stop, tmp_path) -> None:
    """Goes on behind the last piece that was read, and ends with the same file."""
    model = tiny("mixtral")
    expected = made(model, tmp_path).read_bytes()
    pieces, path = pieces_of(model, 6), tmp_path / "again.safetensors"
    partial = tmp_path / "again.safetensors.partial"

    def until(number: int):
        yield from pieces[:number]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, until(stop), path, TINY)
    assert partial.exists() and not path.exists()
    read = []
    calibrate(model, (read.append(i) or piece for i, piece in enumerate(pieces)), path, TINY)
    assert path.read_bytes() == expected and not partial.exists()


def test_interrupted_while_a_layer_is_running(tmp_path, monkeypatch) -> None:
    """The piece that was not finished counts in no layer."""
    model = tiny("mixtral")
    expected = made(model, tmp_path).read_bytes()
    path, calls = tmp_path / "again.safetensors", []
    attend = capture.Recorder.attend

    def interrupted(self, *args):
        calls.append(self.layer_idx)
        if len(calls) == 4 * 3 + 2:
            raise KeyboardInterrupt
        return attend(self, *args)

    monkeypatch.setattr(capture.Recorder, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, pieces_of(model, 6), path, TINY)
    calibrate(model, pieces_of(model, 6), path, TINY)
    assert path.read_bytes() == expected
    assert len(calls) == 4 * 6 + 2, "pieces were read again"


def test_interrupted_while_fitting(tmp_path, monkeypatch) -> None:
    model = tiny("mixtral")
    expected = made(model, tmp_path).read_bytes()
    path, fit, calls = tmp_path / "again.safetensors", run.fit, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(run, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, pieces_of(model, 6), path, TINY)
    calibrate(model, iter(()), path, TINY)  # the texts are not needed again
    assert path.read_bytes() == expected
    assert len(calls) == 3 * 4 + 1, "what was fitted was fitted again"


def test_the_rest_of_another_call_is_not_continued(tmp_path) -> None:
    model, path = tiny("mixtral"), tmp_path / "cal.safetensors"

    def stopped():
        yield from pieces_of(model, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, stopped(), path, TINY, "first text")
    for other, job, source in (
        (build("mixtral", seed=1), TINY, "first text"),
        (model, Job(length=40, windows=4, steps=5), "first text"),
        (model, TINY, "second text"),
    ):
        with pytest.raises(ValueError, match="another model, other texts or other options: delete"):
            calibrate(other, pieces_of(model, 6), path, job, source)


# ---- text ---------------------------------------------------------------------------------------


def test_texts_are_read_in_blocks(bundled, tmp_path, monkeypatch) -> None:
    tokenizer, words = bundled[1], needle_text(3, 2)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text(words)
    paths[1].write_text(needle_text(9, 1))
    monkeypatch.setattr(run, "BLOCK", 100)
    ids = tokenizer(words + " " + needle_text(9, 1)).input_ids
    found = torch.cat([*text_pieces(tokenizer, paths, 37)], dim=1)[0].tolist()
    assert found == ids[: len(ids) // 37 * 37]


def test_pieces_begin_as_texts_do(tmp_path) -> None:
    class Letters:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True, **kwargs):
            ids = [ord(letter) for letter in text]
            return type("Encoding", (), {"input_ids": [7, *ids] if add_special_tokens else ids})

    (tmp_path / "a.txt").write_text("abcdefgh")
    found = [piece.tolist() for piece in text_pieces(Letters(), [tmp_path / "a.txt"], 4)]
    assert found == [[[7, *map(ord, "abc")]], [[7, *map(ord, "def")]]]
