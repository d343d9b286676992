"""Heads that keep everything and heads that stream: who stays, what is freed, which file is taken."""

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import (
    PADDED,
    assert_close,
    assert_same,
    chunks,
    dynamic,
    forward,
    generate,
    held_by,
    paged,
    tail_length,
    tiny,
)
from test_schedulers import kept
from torch import Tensor
from transformers import PreTrainedModel
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.fitting.resumable import write
from pikv_hf.model.artifact import METADATA, ModelIdentity
from pikv_hf.schedulers import AdaKV, ChunkKV, Duo, StreamingLLM
from pikv_hf.schedulers.duo import PROFILE, SCORES, streaming_heads

SINKS, RECENT, OPEN = 3, 12, 5
SMALL = {"sinks": SINKS, "recent": RECENT}
# Of two layers with two KV heads: at sparsity 0.5 head 1 of layer 0 and head 0 of layer 1 stream.
MIXED = ((0.7, 0.2), (0.1, 0.4))


def profile_of(model: PreTrainedModel, path: Path, scores=MIXED) -> Path:
    tensors = {f"{SCORES}{i}": torch.tensor(row) for i, row in enumerate(scores)}
    write(path, tensors, {"model": asdict(ModelIdentity.of(model))}, PROFILE.key)
    return path


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("mixtral", num_hidden_layers=2)


@pytest.fixture
def heads(model, tmp_path) -> Path:
    return profile_of(model, tmp_path / "heads.safetensors")


def stays(mask: Tensor, seen: int, opened: int, streams: bool) -> set[int]:
    """Sealed columns of one row of a head, before which padding is not counted."""
    real = mask[:seen].nonzero().flatten().tolist()
    sealed = [at for at in real if at < seen - opened]
    if not streams:
        return set(sealed)
    newest = [at for at in sealed if at >= seen - RECENT]
    return set(real[:SINKS]) & set(sealed) | set(newest)


@pytest.mark.parametrize("lengths", [(60,), (60, 52, 33)], ids=["one_row", "left_padded"])
@pytest.mark.parametrize("step", [1, 4])
def test_kept_set(model, heads, lengths, step) -> None:
    """After every step, each head's own; all heads see what they hold and nothing else."""
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=Duo(heads, **SMALL), page_size=1, window=OPEN)
    for start, end in chunks(60, 40, step):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        for row in range(len(lengths)):
            for layer, held in enumerate(kept(cache, row)):
                for head, found in enumerate(held):
                    streams = (layer, head) in ((0, 1), (1, 0))
                    assert found == stays(mask[row], end, OPEN, streams)


def test_pages_and_interval(model, heads) -> None:
    """Streaming heads hold less than a page more than sinks and recent tokens, or an interval less."""
    inputs = prompt(model, (90,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for size, interval in ((4, 1), (1, 5)):
        options = {"page_size": size, "window": OPEN, "interval": interval}
        cache = PiKVCache(model, scheduler=Duo(heads, **SMALL), **options)
        most = []
        for start, end in chunks(90, 40):
            forward(model, ids[:, start:end], mask[:, :end], cache)
            layer = paged(cache)[0]
            retrieval, streaming = (tail_length(layer) + held_by(layer, 0)).tolist()
            assert retrieval == end
            most.append(streaming)
        assert max(most) == SINKS + RECENT + size - 1
        assert min(most) == SINKS + RECENT - (interval - 1)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}])
def test_all_retrieval_is_exact(model, heads, mode) -> None:
    inputs = prompt(model, PADDED)
    expected = generate(model, inputs, dynamic(model), **mode)
    cache = PiKVCache(model, scheduler=Duo(heads, sparsity=0.0, **SMALL), page_size=4, window=4)
    assert_same(generate(model, inputs, cache, **mode), expected)
    assert all(layer.state.held_tokens() == layer.state.num_seen for layer in paged(cache))


@pytest.mark.parametrize("compressor", [None, "int8"])
def test_all_streaming_is_streaming_llm(model, heads, compressor) -> None:
    inputs = prompt(model, (60, 44))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 4, "window": OPEN, "compressor": compressor}
    duo = PiKVCache(model, scheduler=Duo(heads, sparsity=1.0, **SMALL), **options)
    plain = PiKVCache(model, scheduler=StreamingLLM(SINKS, RECENT), **options)
    for start, end in chunks(60, 40, 3):
        both = [forward(model, ids[:, start:end], mask[:, :end], c) for c in (duo, plain)]
        assert_close(both[0][mask[:, start:end].bool()], both[1][mask[:, start:end].bool()])
        assert kept(duo, 0) == kept(plain, 0) and kept(duo, 1) == kept(plain, 1)


def test_attention_reads_what_each_head_holds(tmp_path) -> None:
    """A step, beside a full cache that hides from each head what it dropped."""
    model = tiny("mixtral", num_hidden_layers=1)
    path = profile_of(model, tmp_path / "one", scores=((0.1, 0.4),))
    inputs = prompt(model, (60,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=Duo(path, **SMALL), page_size=1, window=OPEN)
    full = dynamic(model)
    for each in (cache, full):
        forward(model, ids[:, :59], mask[:, :59], each)
    opened = set(range(59 - OPEN, 60))
    visible = torch.tensor(
        [[at in held | opened for at in range(60)] for held in kept(cache, 0)[0]]
    )
    assert visible.sum(-1).tolist() == [SINKS + RECENT + 1, 60]
    groups = model.config.num_attention_heads // 2
    hidden = ~visible.repeat_interleave(groups, dim=0)[None, :, None]
    bias = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    expected = forward(model, ids[:, 59:], mask, full, attention_mask=bias)
    assert_close(forward(model, ids[:, 59:], mask, cache), expected)


def test_streaming_heads_free_their_bytes(model, heads) -> None:
    inputs = prompt(model, (1200,))
    held = {}
    for sparsity in (0.0, 0.5, 1.0):
        scheduler = Duo(heads, sparsity, sinks=8, recent=40)
        cache = PiKVCache(model, scheduler=scheduler, page_size=8, window=8)
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        held[sparsity] = sum(
            t.nbytes for layer in paged(cache) for t in layer.state.pages.tensors()
        )
    assert held[1.0] < 0.08 * held[0.0]
    assert 0.5 * held[0.0] < held[0.5] < 0.56 * held[0.0]


def test_sinks_of_the_cache(model, heads) -> None:
    """More sinks than the scheduler's own stay, within what a streaming head holds."""
    inputs = prompt(model, (60,))
    scheduler = Duo(heads, sinks=1, recent=RECENT)
    cache = PiKVCache(model, scheduler=scheduler, sinks=6, page_size=1, window=OPEN)
    forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
    streaming = kept(cache, 0)[0][1]
    assert streaming == {*range(6), 53, 54}


def test_forks_and_copies(model, heads) -> None:
    inputs = prompt(model, (50,))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = PiKVCache(model, scheduler=Duo(heads, **SMALL), page_size=4, window=4)
    forward(model, ids[:, :40], mask[:, :40], cache)
    others = [cache.fork(2), copy.deepcopy(cache)]
    expected = forward(model, ids[:, 40:], mask, cache)
    twice = forward(model, ids[:, 40:].expand(2, -1), mask.expand(2, -1), others[0])
    assert_close(twice, expected.expand(2, -1, -1))
    assert_close(forward(model, ids[:, 40:], mask, others[1]), expected)


def test_which_heads_stream() -> None:
    """The lowest of the whole model, exactly as many as asked for, of equal ones the first."""
    scores = {3: torch.tensor([0.5, 0.5, 0.1]), 1: torch.tensor([0.5, 0.9, 0.0])}
    for sparsity, expected in (
        (0.0, ([], [])),
        (0.3, ([2], [2])),
        (0.5, ([0, 2], [2])),
        (0.6, ([0, 2], [0, 2])),
        (1.0, ([0, 1, 2], [0, 1, 2])),
    ):
        found = streaming_heads(scores, sparsity)
        assert [found[layer].nonzero().flatten().tolist() for layer in (1, 3)] == [*expected]


def test_refusals(model, heads, tmp_path) -> None:
    with pytest.raises(ValueError, match="pikv profile"):
        PiKVCache(model, scheduler="duo")
    with pytest.raises(ValueError, match="`profile` is '/no/such'; there is no such file"):
        Duo("/no/such")
    write(tmp_path / "cal", {}, {}, METADATA)
    with pytest.raises(ValueError, match="no file that `pikv profile` made"):
        Duo(tmp_path / "cal")
    with pytest.raises(ValueError, match="`profile` .* was made for .*: its weight"):
        PiKVCache(build("mixtral", num_hidden_layers=2, seed=9), scheduler=Duo(heads))
    with pytest.raises(ValueError, match="its model type is olmoe"):
        PiKVCache(tiny("olmoe"), scheduler=Duo(heads))
    with pytest.raises(ValueError, match="`budget` is 0.5, but the heads"):
        PiKVCache(model, scheduler=Duo(heads), budget=0.5)
    for wrapper in (AdaKV, ChunkKV):
        with pytest.raises(ValueError, match="lengths of their own"):
            wrapper(Duo(heads))
    for sparsity in (-0.1, 1.1, True, "a"):
        with pytest.raises(ValueError, match="`sparsity` is"):
            Duo(heads, sparsity)
    for options in ({"sinks": -1}, {"recent": 0}, {"recent": 1.5}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
            Duo(heads, **options)
    with pytest.raises(TypeError, match="`profile` is 3"):
        Duo(3)


def test_a_profile_of_other_heads(tmp_path) -> None:
    """As if it were made by hand: latents (MLA) have one head."""
    model = tiny("deepseek_v3")
    layers = len(paged(PiKVCache(model)))
    path = profile_of(model, tmp_path / "heads", ((0.1, 0.2),) * layers)
    inputs = prompt(model, (60,))
    cache = PiKVCache(model, scheduler=Duo(path, **SMALL), page_size=4, window=4)
    with pytest.raises(ValueError, match="has 2 KV heads for layer 0, but the cache has 1"):
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
