"""Few tokens take few bytes: buffers grow with a text, and a fork copies what is open of it."""

import random
from collections.abc import Iterable, Iterator

import pytest
import torch
from helpers import dynamic, forward, paged, rows_of, tiny
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.cache.report import _cache_tensors
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.schedulers import AdaKV, KeyDiff
from pikv_hf.storage.memory import storage_bytes, storages, tensors_in

CONSTANT = 2**14
ROWS, HEADS, DIM = 2, 4, 64
TOKEN = ROWS * HEADS * 2 * DIM * 4
SETTINGS = [
    {},
    {"page_size": 256},
    {"page_size": 1, "window": 1},
    {"compressor": "int8"},
    {"scheduler": "knorm", "budget": 4096},
    {"scheduler": "knorm", "budget": 4096, "page_size": 256},
    {"scheduler": "knorm", "budget": 0.9},
    {"scheduler": AdaKV(KeyDiff()), "budget": 0.9},
    {"scheduler": AdaKV(KeyDiff()), "budget": 700, "page_size": 16},
]


def held_bytes(layer: PagedLayer) -> int:
    return storage_bytes([*layer.state.tensors(), *layer.state.step.buffer.tensors()])


def lengths(layer: PagedLayer, pieces: Iterable[int]) -> Iterator[int]:
    """Reads `pieces` of a text; yields how many tokens were read."""
    seen = 0
    for new in pieces:
        layer.update(*torch.randn(2, ROWS, HEADS, new, DIM))
        assert take_layer() is layer
        layer.finish()
        layer.state.step.release()
        seen += new
        yield seen


def random_pieces(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([1, draw.randint(1, 64), draw.randint(1, 600)]) for _ in range(30)]


PIECES = {
    "tokens": [1] * 1300,
    "prompt": [300, *[7] * 140],
    "sixties": [1, *[61] * 67],
    **{f"random{seed}": random_pieces(seed) for seed in range(3)},
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_little_more_than_the_tokens(options, pieces) -> None:
    layer = PiKVCache(tiny("mixtral"), **options).layers[0]
    for seen in lengths(layer, PIECES[pieces]):
        assert held_bytes(layer) <= 1.25 * seen * TOKEN + CONSTANT, seen


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_little_more_than_the_tokens_of_a_prompt(options) -> None:
    layer = PiKVCache(tiny("mixtral"), **options).layers[0]
    for length in (2, 129, 577, 1000, 2049, 3333, 4095, 4096):
        layer.reset()
        assert [*lengths(layer, [length])] == [length]
        assert held_bytes(layer) <= 1.25 * length * TOKEN + CONSTANT, length


def test_a_full_tail_stays_where_it_is() -> None:
    """It moves rarely while it grows, and not at all once it has its full size."""
    layer = PiKVCache(tiny("mixtral")).layers[0]
    places = []
    for _ in lengths(layer, [1] * 1300):
        places.append((layer.state.tail.keys.data_ptr(), layer.state.tail.values.data_ptr()))
    moved = [at for at in range(1, 1300) if places[at] != places[at - 1]]
    assert len(moved) <= 25 and max(moved) < 512 + 128
    layer.reset()
    read = lengths(layer, [900, *[1] * 400])
    next(read)
    place = layer.state.tail.keys.data_ptr()
    assert all(layer.state.tail.keys.data_ptr() == place for _ in read)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("options", [{}, {"scheduler": "h2o", "budget": 0.5}], ids=str)
@pytest.mark.parametrize("length", [1, 24, 72])
def test_beside_dynamic_cache(name, options, length) -> None:
    """Of a model, with the queries of a prompt that is not sealed gone; and held back, too."""
    model = tiny(name)
    inputs = prompt(model, (length, length))
    expected, cache, held = dynamic(model), *(PiKVCache(model, **options) for _ in range(2))
    forward(model, *inputs.values(), expected)
    forward(model, *inputs.values(), cache)
    full = storage_bytes(tensors_in([vars(layer) for layer in expected.layers]))
    most = 1.25 * full + CONSTANT * len(cache.layers)
    assert cache.nbytes <= most
    with held.holding():
        forward(model, *inputs.values(), held)
        assert held.nbytes <= most
    assert held.nbytes <= most


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_fork_copies_what_the_report_says(name) -> None:
    model = tiny(name, max_position_embeddings=1024)
    for length, options in ((72, {}), (480, {"compressor": "int4", "window": 32})):
        cache = PiKVCache(model, **options)
        inputs = prompt(model, (length,))
        forward(model, *inputs.values(), cache)
        costs, row = cache.report().fork_nbytes, cache.nbytes
        fork = cache.fork(8)
        both = storages([*_cache_tensors(cache), *_cache_tensors(fork)])
        added = sum(both.values()) - row
        assert added == pytest.approx(8 * costs, rel=0.02)
        assert fork.nbytes <= 8 * row
        assert rows_of(paged(fork)[0]) == 8
    assert costs < 0.7 * row, "pages are shared"
