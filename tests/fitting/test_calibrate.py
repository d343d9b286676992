"""Calibration: what is captured, what is fitted, what is written, and for which model it is taken."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import SMALL, assert_close, dynamic, forward, generate, paged, slabs_of, tiny
from safetensors.torch import load_file, save_file
from test_combinations import assert_reads_what_was_kept, one_layer
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.commands.app import app
from pikv_hf.compressors import Distill, LowRank, LowRankAffine
from pikv_hf.fitting import calibrate as run
from pikv_hf.fitting import capture
from pikv_hf.fitting.calibrate import calibrate, text_pieces
from pikv_hf.fitting.calibration_job import METHODS, Job
from pikv_hf.fitting.capture import HELD_OUT, QUERIES, Observer, Window
from pikv_hf.model import loading
from pikv_hf.model.artifact import read_metadata
from pikv_hf.model.versions import with_cache
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack
from pikv_hf.schedulers import AdaKV, SnapKV, StreamingLLM

TINY = Job(length=40, windows=4, steps=4)
KINDS = pytest.mark.parametrize("kind", METHODS.values(), ids=str)
FAMILIES = pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])


def pieces_of(model: PreTrainedModel, count: int, job: Job = TINY, seed: int = 5) -> list[Tensor]:
    ids = prompt(model, (count * job.piece_tokens,), seed=seed)["input_ids"]
    return [*ids.split(job.piece_tokens, dim=1)]


def made(model: PreTrainedModel, folder: Path, job: Job = TINY, count: int = 6) -> Path:
    path = folder / "cal.safetensors"
    calibrate(model, pieces_of(model, count, job), path, job)
    return path


def cached_states(
    model: PreTrainedModel, piece: Tensor, length: int
) -> list[tuple[Tensor, Tensor]]:
    """What pages hold of the first `length` tokens, by layer, [H, T, D], from transformers' cache."""
    cache = dynamic(model)
    with torch.no_grad():
        model(piece, **with_cache(cache))
    states = [(layer.keys[0, :, :length], layer.values[0, :, :length]) for layer in cache.layers]
    if getattr(model.config, "kv_lora_rank", None):
        return [(torch.cat(pair, dim=-1), pair[0][..., :0]) for pair in states]
    return states


# ---- what is captured ---------------------------------------------------------------------------


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
        assert torch.allclose(layer.keys.second, every.mT @ every, rtol=1e-3, atol=1e-2)
        assert torch.allclose(layer.keys.first, every.sum(1), rtol=1e-3, atol=1e-2)


def test_captured_queries_are_those_of_the_model() -> None:
    """Their weights over the window are the model's own attention weights, up to a factor."""
    model = tiny("mixtral")
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


# ---- what is fitted -----------------------------------------------------------------------------


def centred(states: Tensor, kind: type[LowRank]) -> Tensor:
    return states - states.mean(1, keepdim=True) if kind is not LowRank else states


@KINDS
@FAMILIES
def test_untrained_error_is_that_of_the_principal_axes(kind, family, tmp_path) -> None:
    """On the texts of the calibration: the tail of the singular values of all keys, and values."""
    model = tiny(family)
    job = Job(methods=(kind.name,), rank=5, length=24, steps=0)
    pieces = pieces_of(model, 6, job)
    path = tmp_path / "cal.safetensors"
    calibrate(model, pieces, path, job)
    fitted = [cached_states(model, p, 24) for i, p in enumerate(pieces) if i % HELD_OUT != 1]
    for idx in range(len(fitted[0])):
        compressor = kind(calibration=path).bind(model.config, idx)
        keys, values = (torch.cat([f[idx][i] for f in fitted], dim=1).double() for i in range(2))
        pages = [states.unflatten(1, (-1, 8))[None] for states in (keys, values)]
        decoded = compressor.decode(compressor.encode(*pages))
        for states, page, back in zip((keys, values), pages, decoded, strict=True):
            if states.shape[-1]:
                error = (page - back).square().sum((0, 2, 3, 4))
                tail = torch.linalg.svdvals(centred(states, kind))[:, 5:].square().sum(1)
                assert torch.allclose(error, tail, rtol=1e-3)


def test_a_bias_does_not_make_the_error_larger(tmp_path) -> None:
    model = tiny("mixtral")
    path = made(model, tmp_path, Job(rank=5, length=24, steps=0), count=1 + 1)
    keys, values = (
        states[None, :, None]
        for states in cached_states(model, pieces_of(model, 2, Job(length=24))[0], 24)[1]
    )
    errors = []
    for kind in (LowRankAffine, LowRank):
        compressor = kind(calibration=path).bind(model.config, 1)
        decoded = compressor.decode(compressor.encode(keys, values))
        errors.append([(a - b).norm().item() for a, b in zip((keys, values), decoded, strict=True)])
    assert errors[0][0] < errors[1][0] and errors[0][1] < errors[1][1]


@KINDS
def test_training_that_does_not_help_changes_nothing(kind, tmp_path, monkeypatch) -> None:
    """Then the file is the untrained one."""
    model = tiny("mixtral")
    untrained = load_file(made(model, tmp_path, Job((kind.name,), length=24, steps=0)))
    monkeypatch.setattr("pikv_hf.fitting.projections.RATE", 100.0)
    trained = load_file(made(model, tmp_path, Job((kind.name,), length=24, steps=5)))
    assert trained.keys() == untrained.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in untrained.items())


@KINDS
def test_full_rank_loses_nothing(kind, tmp_path) -> None:
    model = tiny("mixtral")
    path = made(model, tmp_path, Job(rank=999, length=24, steps=3))
    compressor = kind(calibration=path).bind(model.config, 0)
    keys = torch.randn(1, 2, 3, 8, 16, dtype=torch.float64)
    for states in compressor.decode(compressor.encode(keys, keys)):
        assert (states - keys).abs().max() < 1e-4


@KINDS
def test_decoded_pages_are_encoded_again_without_loss(kind, tmp_path) -> None:
    """After training too: in other pages, in another order."""
    model = tiny("mixtral")
    compressor = kind(calibration=made(model, tmp_path, Job(length=24, steps=30))).bind(
        model.config, 0
    )
    keys = torch.randn(1, 2, 3, 8, 16, dtype=torch.float64)
    once = compressor.decode(compressor.encode(keys, keys))
    mixed = [states.flatten(2, 3).flip(2).unflatten(2, (4, 6)) for states in once]
    again = compressor.decode(compressor.encode(*mixed))
    for first, second in zip(mixed, again, strict=True):
        assert (first - second).norm() < 1e-4 * first.norm()
    assert (once[0] - keys).norm() > 0.1 * keys.norm()


# ---- the bundled model, on text that was not calibrated with ------------------------------------

NEEDLES = Job(rank=8, length=447, windows=16, steps=300)


def needle_text(first: int, count: int) -> str:
    stacks = (make_haystack(length=512, needles=8, seed=first + i) for i in range(count))
    return "\n".join(f"{stack.prompt()} {stack.answers[0]} ." for stack in stacks)


@pytest.fixture(scope="module")
def bundled():
    return loading.load(str(NEEDLE_MODEL))


@pytest.fixture(scope="module")
def calibrations(bundled, tmp_path_factory) -> dict[str, Path]:
    """Untrained and trained, on 24 haystacks."""
    folder = tmp_path_factory.mktemp("needles")
    (folder / "train.txt").write_text(needle_text(1000, 24))
    paths = {}
    for name, steps in (("untrained", 0), ("trained", NEEDLES.steps)):
        job = Job(rank=8, length=447, windows=16, steps=steps)
        pieces = text_pieces(bundled[1], [folder / "train.txt"], job.piece_tokens)
        paths[name] = folder / f"{name}.safetensors"
        calibrate(bundled[0], pieces, paths[name], job)
    return paths


@pytest.fixture(scope="module")
def held_out(bundled, tmp_path_factory) -> Observer:
    """Windows of haystacks with other seeds."""
    path = tmp_path_factory.mktemp("held_out") / "test.txt"
    path.write_text(needle_text(900_000, 6))
    observer = Observer(bundled[0], NEEDLES.length, windows=99)
    for piece in text_pieces(bundled[1], [path], NEEDLES.piece_tokens):
        observer.read(piece)
    observer.close()
    return observer


def output_error(observer: Observer, compressor: LowRank) -> float:
    """Of attention over compressed pages and the newest eighth of the keys as it is, in float64."""
    config, change, size = observer.model.config, 0.0, 0.0
    for idx, layer in observer.captured.layers.items():
        bound = compressor.bind(config, idx)
        for window in (*layer.fitted, *layer.held_out):
            query, *states = (t.double()[None] for t in window)
            sealed = states[0].shape[2] * 7 // 8 // 16 * 16
            pages = [t[:, :, :sealed].unflatten(2, (-1, 16)) for t in states]
            near = [
                torch.cat([page.flatten(2, 3), exact[:, :, sealed:]], dim=2)
                for page, exact in zip(bound.decode(bound.encode(*pages)), states, strict=True)
            ]
            exact, changed = (exact_output(query, *kv, layer.scale) for kv in (states, near))
            change += (changed - exact).square().sum().item()
            size += exact.square().sum().item()
    return (change / size) ** 0.5


def exact_output(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return (query @ keys.mT * scale).softmax(-1) @ (values if values.shape[-1] else keys)


@KINDS
def test_training_helps_attention_on_other_text(kind, calibrations, held_out) -> None:
    errors = {
        name: output_error(held_out, kind(calibration=path)) for name, path in calibrations.items()
    }
    assert 0.1 < errors["untrained"] < 0.7
    assert errors["trained"] < 0.92 * errors["untrained"], errors


def test_training_helps_latents(tmp_path) -> None:
    """A random model of latent attention, random tokens."""
    model = tiny("deepseek_v3")
    job = Job(length=128, windows=64, steps=150)
    path = made(model, tmp_path, job, count=84)
    (tmp_path / "plain").mkdir()
    plain = made(model, tmp_path / "plain", Job(length=128, windows=64, steps=0), count=84)
    observer = Observer(model, 128, windows=99)
    for piece in pieces_of(model, 16, job, seed=77):
        observer.read(piece)
    observer.close()
    for kind in METHODS.values():
        trained, untrained = (
            output_error(observer, kind(calibration=file)) for file in (path, plain)
        )
        assert trained < 0.99 * untrained < 0.6


def test_the_errors_in_the_file_are_those_of_held_out_text(calibrations, held_out) -> None:
    written = read_metadata(calibrations["trained"])["held_out_errors"]
    for kind in METHODS.values():
        before, after = zip(*written[kind.name].values(), strict=True)
        measured = output_error(held_out, kind(calibration=calibrations["trained"]))
        assert min(after) * 0.8 < measured < max(after) * 1.2
        assert all(a < b for a, b in zip(after, before, strict=True))


def test_distill_is_better_than_what_it_begins_with(calibrations, held_out) -> None:
    """Its hidden units are used, and without them the error is larger."""
    trained = Distill(calibration=calibrations["trained"])
    error = output_error(held_out, trained)

    class Dropped(Distill):
        def bind(self, config, layer_idx):
            factors = dict(super().bind(config, layer_idx)._factors)
            for name in ("key", "value"):
                up = factors[f"{name}_up"].clone()
                up[:, factors[f"{name}_down"].shape[-1] :] = 0
                factors[f"{name}_up"] = up
            return Distill.with_factors(self, factors)

    assert error < output_error(held_out, Dropped(calibration=calibrations["trained"]))


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


# ---- which model it is for ----------------------------------------------------------------------


def refused(model: PreTrainedModel, compressor, match: str) -> None:
    before = dict(vars(model))
    with pytest.raises(ValueError, match=match):
        PiKVCache(model, compressor=compressor)
    assert vars(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_uncalibrated(name) -> None:
    refused(tiny("mixtral"), name, f"{name} needs a calibration for the model: make one with")


def test_another_model(tmp_path) -> None:
    path = made(tiny("mixtral"), tmp_path)
    compressor = LowRank(calibration=path)
    was = r"`calibration` '.*cal.safetensors' was made for MixtralForCausalLM, not for "
    refused(tiny("olmoe"), compressor, was + "OlmoeForCausalLM: its model type is olmoe, not mixt")
    layers = build("mixtral", num_hidden_layers=3)
    refused(layers, compressor, was + ".*: its num_hidden_layers is 3, not 4")
    refused(build("mixtral", seed=1), compressor, was + ".*: its weight .* has other numbers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_model_in_another_dtype(dtype, tmp_path) -> None:
    path = made(tiny("mixtral"), tmp_path)
    model = copy.deepcopy(tiny("mixtral")).to(dtype)
    with PiKVCache(model, compressor=LowRank(calibration=path), **SMALL) as cache:
        if dtype != torch.float64:  # grouped experts have none
            generate(model, prompt(model, (30,)), cache)


def test_files_that_are_no_calibration(tmp_path) -> None:
    model = tiny("mixtral")
    refused(model, LowRank(calibration="/no/file"), "`calibration` is '/no/file'; there is no such")
    (tmp_path / "text").write_text("not a file of numbers")
    refused(
        model, LowRank(calibration=tmp_path / "text"), "`calibration` '.*text' cannot be read: "
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    refused(model, LowRank(calibration=tmp_path / "other"), "'.*other' is no file that `pikv calib")
    path = made(model, tmp_path, Job(methods=("lowrank",), length=24, steps=0))
    refused(
        model,
        LowRankAffine(calibration=path),
        "was made for lowrank, not for lowrank_affine: run `pikv calibrate --method lowrank_affine`",
    )
    with pytest.raises(TypeError, match="`calibration` is 3; it must be the path of a file"):
        LowRank(calibration=3)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"methods": ("int8",)}, r"`methods` are \['int8'\]; they must be among"),
        ({"methods": ()}, "at least one"),
        ({"rank": 0}, "`rank` is 0; it must be a positive whole number"),
        ({"length": 1.5}, "`length` is 1.5"),
        ({"windows": -1}, "`windows` is -1"),
        ({"steps": -1}, "`steps` is -1; it must be a whole number, 0 or more"),
    ],
)
def test_wrong_jobs(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        Job(**options)


def test_what_cannot_be_calibrated(tmp_path) -> None:
    model, path = tiny("mixtral"), tmp_path / "cal.safetensors"
    with pytest.raises(
        ValueError, match="fewer than 210 tokens, two pieces of 105: give more text"
    ):
        calibrate(model, pieces_of(model, 1), path, TINY)
    with pytest.raises(ValueError, match="`length` is 500, and 65 more tokens .* at most 512"):
        calibrate(model, pieces_of(model, 1), path, Job(length=500))
    broken = build("mixtral")
    broken.model.layers[2].self_attn.k_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="layer 2: .*keys.* NaN"):
        calibrate(broken, pieces_of(model, 3), path, TINY)
    assert not [*tmp_path.iterdir()], "an attempt that cannot succeed leaves nothing"


# ---- in a cache ---------------------------------------------------------------------------------


@KINDS
def test_weights_are_counted_once(kind, tmp_path) -> None:
    model = tiny("mixtral")
    path = made(model, tmp_path)
    factors = load_file(path)
    mine = {k: t for k, t in factors.items() if k.startswith(f"{kind.name}.")}
    with PiKVCache(model, compressor=kind(calibration=path), **SMALL) as cache:
        assert cache.nbytes == sum(t.numel() * t.element_size() for t in mine.values()) > 0
        empty = cache.nbytes
        forward(model, prompt(model, (40,))["input_ids"], torch.ones(1, 40), cache)
        layer = paged(cache)[1]
        held = sum(t.nbytes for t in layer.state.pages.codec.tensors())
        assert held == sum(t.nbytes for k, t in mine.items() if k.startswith(f"{kind.name}.1."))
        assert cache.report().layers[1].nbytes > held and cache.nbytes > empty
        cache.reset()
        assert cache.nbytes == empty


@KINDS
def test_saved_and_loaded(kind, tmp_path) -> None:
    """A saved cache carries its projections: the file is not needed any more."""
    model = tiny("mixtral")
    path = made(model, tmp_path)
    ids = prompt(model, (60,))["input_ids"]
    logits = []
    cache = PiKVCache(model, compressor=kind(calibration=path), **SMALL)
    forward(model, ids[:, :40], torch.ones(1, 40), cache)
    torch.save(cache, tmp_path / "cache.pt")
    path.unlink()
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False).attach(model)
    for each in (cache, copy.deepcopy(cache), loaded):
        logits.append(forward(model, ids[:, 40:], torch.ones(1, 60), each))
        each.detach()
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@KINDS
@pytest.mark.parametrize("router", [None, "all"])
def test_with_a_scheduler(kind, router, tmp_path) -> None:
    """What streaming keeps is what a cache without a scheduler holds of the same tokens."""
    model = tiny("mixtral")
    path = made(model, tmp_path)
    ids = prompt(model, (90,))["input_ids"]
    held = []
    for scheduler in (None, StreamingLLM(sinks=4, window=16)):
        options = {"compressor": kind(calibration=path), "scheduler": scheduler, "router": router}
        with PiKVCache(model, **options, **SMALL) as cache:
            # In one piece, so that both read the same; then sealed again and again.
            forward(model, ids[:, :60], torch.ones(1, 60), cache)
            layer = paged(cache)[0]
            first = torch.cat(
                [s.span([0], with_values=False)["keys"] for s in slabs_of(layer)], dim=2
            )
            held.append(first[:, :, :4])
    assert_close(held[1], held[0])


@KINDS
def test_heads_of_different_lengths(kind, tmp_path) -> None:
    """Each head is read by its own projections, however many tokens it holds."""
    path = made(one_layer(), tmp_path)
    scheduler = AdaKV(SnapKV(window_size=6, kernel_size=3))
    assert assert_reads_what_was_kept(scheduler, kind(calibration=path))


@KINDS
@pytest.mark.parametrize("part", [0, 1])
def test_numbers_that_have_no_code(kind, part, tmp_path) -> None:
    model = tiny("mixtral")
    with PiKVCache(model, compressor=kind(calibration=made(model, tmp_path)), **SMALL) as cache:
        layer = paged(cache)[1]
        pair = [torch.randn(1, 2, 16, 16) for _ in range(2)]
        pair[part][0, 1, 5, 3] = float("inf")
        layer.update(*pair)
        named = f"layer 1: {kind.name} cannot store {['key', 'value'][part]}s that are NaN or inf"
        with pytest.raises(ValueError, match=named):
            layer.finish(None)


# ---- the command --------------------------------------------------------------------------------


def pikv(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


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
