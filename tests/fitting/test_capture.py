"""Calibration captures the keys, values and queries of the model, in bounded memory."""

import torch
from calibrations import FAMILIES, TINY, cached_states, made, pieces_of
from helpers import assert_close, tiny
from tolerances import FITTED, MOMENTS
from zoo import build

from pikv_hf.fitting import capture
from pikv_hf.fitting.calibration_job import Job
from pikv_hf.fitting.capture import QUERIES, Observer, Window


@FAMILIES
def test_captured_keys_and_values_are_those_of_the_model(family) -> None:
    model = tiny(family)
    pieces = pieces_of(model, 7)
    observer = Observer(model, TINY.length, windows=99)
    for piece in pieces:
        observer.read(piece)
    observer.close()
    held = [cached_states(model, piece, TINY.length) for piece in pieces]
    for idx, layer in observer.captured.layers.items():
        windows = {name: getattr(layer, name) for name in ("fitted", "held_out")}
        expected = {"fitted": [0, 2, 3, 4, 6], "held_out": [1, 5]}
        for name, numbers in expected.items():
            assert len(windows[name]) == len(numbers)
            for window, number in zip(windows[name], numbers, strict=True):
                assert_close(window.keys, held[number][idx][0])
                assert window.values.shape == held[number][idx][1].shape
                if family != "deepseek_v3":  # latents have no values beside them
                    assert_close(window.values, held[number][idx][1])
        every = torch.cat([held[n][idx][0] for n in expected["fitted"]], dim=1).double()
        assert layer.keys.count == every.shape[1]
        assert torch.allclose(layer.keys.second, every.mT @ every, rtol=FITTED, atol=MOMENTS)
        assert torch.allclose(layer.keys.first, every.sum(1), rtol=FITTED, atol=MOMENTS)


def test_captured_queries_are_those_of_the_model() -> None:
    """Their weights over the window are the model's own attention weights, up to a factor."""
    model = build("mixtral")  # `output_attentions` leaves hooks of transformers on it
    piece = pieces_of(model, 1)[0]
    observer = Observer(model, TINY.length, windows=1)
    observer.read(piece)
    observer.close()
    with torch.no_grad():
        weights = model(piece, output_attentions=True).attentions
    for idx, layer in observer.captured.layers.items():
        query, keys, _ = layer.fitted[0]
        mine = (query @ keys.mT * layer.scale).softmax(-1)
        theirs = weights[idx][0, :, -QUERIES:, : TINY.length]
        theirs = theirs.reshape(mine.shape) / theirs.sum(-1).reshape(*mine.shape[:2], 1)
        assert_close(mine, theirs)


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model = tiny("mixtral")
    before, config = dict(vars(model)), model.model.layers[0].self_attn.config
    made(model, tmp_path)
    assert vars(model) == before and model.model.layers[0].self_attn.config is config


def test_windows_are_a_uniform_sample_of_bounded_size() -> None:
    drawn: tuple[Window, ...] = ()
    for number in range(4000):
        drawn = capture._drawn(drawn, Window(*torch.full((3, 1), float(number))), number, 400)
        assert len(drawn) == min(number + 1, 400)
    numbers = torch.cat([window.query for window in drawn])
    assert len(numbers.unique()) == 400
    assert (torch.histc(numbers, 4, 0, 4000) - 100).abs().max() < 35


def test_memory_does_not_grow_with_the_text() -> None:
    model = tiny("mixtral")
    observer = Observer(model, 16, windows=4)
    for piece in pieces_of(model, 24, Job(length=16)):
        observer.read(piece)
    observer.close()
    for layer in observer.captured.layers.values():
        assert (len(layer.fitted), len(layer.held_out)) == (4, 1)
        assert layer.keys.second.shape == (2, 16, 16) and layer.keys.count == 18 * 16
