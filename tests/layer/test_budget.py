"""What a cache may hold: tokens, shares, bytes; prompts and generated tokens apart; sinks."""

import pytest
import torch
from helpers import chunks, forward, generate, held_by, paged, tail_length, tiny
from test_schedulers import kept
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.layer.budget import Budget, make_budget
from pikv_hf.schedulers import AdaKV, ExpectedAttention, LagKV, PyramidKV, SnapKV, StreamingLLM
from pikv_hf.validation import parse_bytes

SMALL = {"page_size": 1, "window": 4}


def type_name(method) -> str:
    return method if isinstance(method, str) else type(method).__name__


def held(cache: PiKVCache) -> int:
    return paged(cache)[0].state.held_tokens()


def read(cache, model, inputs, first: int, step: int = 1) -> list[tuple[int, int]]:
    """(tokens seen, tokens held) after a prompt of `first` and after each step of `step`."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    out = []
    for start, end in [(0, first), *((at, at + step) for at in range(first, ids.shape[1], step))]:
        forward(model, ids[:, start:end], mask[:, :end], cache)
        out.append((end, held(cache)))
    return out


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (20, lambda seen: 20),
        (0.5, lambda seen: seen // 2),
        ({"prefill": 0.5}, lambda seen: 20 + seen - 40),
        ({"prefill": 12}, lambda seen: 12 + seen - 40),
        ({"decode": 24}, lambda seen: 40 if seen == 40 else 24),
        ({"prefill": 0.5, "decode": 0.25}, lambda seen: 20 if seen == 40 else seen // 4),
        ({"prefill": 10, "decode": 30}, lambda seen: min(10 + seen - 40, 30)),
    ],
)
def test_prefill_and_decode(budget, expected) -> None:
    """Tokens held after a prompt of 40 and after each generated token."""
    model = tiny("mixtral")
    cache = PiKVCache(model, scheduler="knorm", budget=budget, interval=1, **SMALL)
    for seen, tokens in read(cache, model, prompt(model, (80,)), 40):
        assert tokens == expected(seen), seen


@pytest.mark.parametrize(
    ("name", "method", "budget", "options"),
    [
        ("mixtral", "knorm", 0.125, {}),
        ("mixtral", "knorm", {"prefill": 0.9, "decode": 0.1}, {"page_size": 8}),
        ("gpt_oss", "adakv", 0.25, {"page_size": 4, "window": 128}),
        ("deepseek_v3", "knorm", 0.25, {"page_size": 8, "sinks": 8}),
        ("qwen3_next", "adakv", {"prefill": 0.25}, {"page_size": 8}),
    ],
    ids=str,
)
def test_a_share_is_never_exceeded(name, method, budget, options) -> None:
    """By more than a page: not by a row of a batch, nor while a text is short, nor as it grows."""
    model, length, first = tiny(name), 220, 200
    inputs = prompt(model, (length, 150))
    cache = PiKVCache(model, scheduler=method, budget=budget, **options)
    amounts = make_budget(budget)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for start, end in chunks(length, first):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        for layer in paged(cache):
            for row, seen in enumerate(mask[:, :end].sum(-1).tolist()):
                allowed = amounts.tokens(seen, end - first, int)
                pages = held_by(layer, row)
                assert pages is not None, "it is long enough for a choice"
                held = pages.double().mean() + seen - layer.state.num_departed[row]
                assert allowed / 2 <= held <= allowed + cache.settings.page_size, (row, end)


def test_defaults_leave_a_choice() -> None:
    """At 512 tokens half of a share is for the scheduler to fill; a short text, too."""
    model = tiny("mixtral", max_position_embeddings=1024)
    for budget, length, least in ((0.125, 512, 32), (0.25, 512, 64), (0.25, 70, 9)):
        cache = PiKVCache(model, scheduler="knorm", budget=budget)
        inputs = prompt(model, (length,))
        forward(model, inputs["input_ids"], inputs["attention_mask"], cache)
        assert held(cache) - tail_length(paged(cache)[0]) == least


def test_interval() -> None:
    """The budget is never exceeded: so many go at once that those of an interval fit."""
    model = tiny("mixtral")
    inputs = prompt(model, (90,))
    cache = PiKVCache(model, scheduler="knorm", budget=20, interval=8, **SMALL)
    counts = [tokens for _, tokens in read(cache, model, inputs, 40)]
    assert counts[0] == 20
    assert counts[1:17] == [13, 14, 15, 16, 17, 18, 19, 20] * 2
    streams = []
    for interval in (1, 8):
        cache = PiKVCache(model, scheduler="streaming_llm", interval=interval, **SMALL)
        read(cache, model, inputs, 40)
        streams.append(kept(cache, 0))
    assert streams[0] == streams[1], "nothing was over 1024 tokens"


def test_a_long_interval_takes_no_memory_before_it_is_used() -> None:
    model = tiny("mixtral")
    inputs, sizes = prompt(model, (90,)), []
    for interval in (1, 10**9):
        cache = PiKVCache(model, scheduler="knorm", budget=64, interval=interval, **SMALL)
        read(cache, model, inputs, 80)
        sizes.append(cache.nbytes)
    assert sizes[1] < 1.5 * sizes[0]


def test_a_sixteenth_of_the_budget_goes_at_once() -> None:
    model = tiny("mixtral")
    inputs = prompt(model, (140,))
    options = {"scheduler": "knorm", "page_size": 2, "window": 4}
    found = {}
    for budget in (20, 64, 100):
        cache = PiKVCache(model, budget=budget, **options)
        counts = [tokens for _, tokens in read(cache, model, inputs, 110)]
        assert counts[0] == budget
        found[budget] = min(counts) - budget, max(counts) - budget
    # Pages of 2 tokens, none, 2 and 3 of them: one of them is being sealed, another half open.
    assert found == {20: (0, 1), 64: (-2, 1), 100: (-4, 1)}


@pytest.mark.parametrize("method", ["knorm", "snapkv", "adakv", "random", "pyramidkv"])
def test_sinks_stay(method) -> None:
    """The first tokens of each row stay, whatever their scores; without `sinks` some do not."""
    model = tiny("mixtral")
    inputs = prompt(model, (60, 47))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    firsts = [set(range(60 - length, 60 - length + 3)) for length in (60, 47)]
    all_kept = {}
    for sinks in (0, 3):
        cache = PiKVCache(model, scheduler=method, budget=16, sinks=sinks, **SMALL)
        forward(model, ids[:, :50], mask[:, :50], cache)
        for end in range(51, 61):
            forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
        sets = [[head for layer in kept(cache, row) for head in layer] for row in (0, 1)]
        stay = all(first <= s for first, row in zip(firsts, sets, strict=True) for s in row)
        all_kept[sinks] = stay
        totals = [sum(map(len, row)) for row in sets]
        if method != "pyramidkv":  # whose last layer may keep no more than the sinks
            assert totals == [12 * len(sets[0])] * 2
    assert all_kept[3]
    if method in ("knorm", "random"):  # what others score, the first tokens often win anyway
        assert not all_kept[0]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("compressor", [None, "int8", "pikv"])
@pytest.mark.parametrize(
    "method", ["knorm", SnapKV(window_size=4), AdaKV(SnapKV(window_size=4))], ids=type_name
)
@pytest.mark.parametrize("interval", [1, 16])
def test_bytes(name, compressor, method, interval) -> None:
    """The cache never holds more bytes than the budget, and uses most of it."""
    model = tiny(name)
    length = {"mixtral": 340, "deepseek_v3": 700}[name]  # queries of latents are larger than they
    inputs = prompt(model, (length, length - 30))
    options = {"page_size": 8, "window": 8, "compressor": compressor, "interval": interval}
    unlimited = PiKVCache(model, **{**options, "interval": 1})
    generate(model, inputs, unlimited, max_new_tokens=2)
    limit = unlimited.nbytes // 2
    cache = PiKVCache(model, scheduler=method, budget=f"{limit}B", **options)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    used = []
    for start, end in chunks(length, length - 24):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        used.append(cache.nbytes)
    assert max(used) <= limit
    assert min(used) >= 0.6 * limit


def test_what_is_no_budget() -> None:
    model = tiny("mixtral")
    for given in (0, -1, True, 1.5, 0.0, "2 apples", "GiB", "0B", {}, {"prompt": 3}, {"decode": 0}):
        with pytest.raises(ValueError, match="`budget"):
            PiKVCache(model, scheduler="knorm", budget=given)
    with pytest.raises(ValueError, match="`budget` is 1000 bytes.*leaves 140 for layer 0"):
        cache = PiKVCache(model, scheduler="knorm", budget="1kB", **SMALL)
        read(cache, model, prompt(model, (40,)), 40)
    for sinks in (-1, 1.0, True):
        with pytest.raises(ValueError, match="`sinks` is"):
            PiKVCache(model, scheduler="knorm", budget=100, sinks=sinks)
    with pytest.raises(ValueError, match="exceeds a budget of 20 tokens"):
        PiKVCache(model, scheduler="knorm", budget=20, sinks=17, window=4)
    for method in (StreamingLLM(sinks=17), LagKV(sinks=17), ExpectedAttention(sinks=17)):
        for wrapped in (method, PyramidKV(method)):
            told = (
                "`scheduler` is .*, whose number of sinks, 17, with a window of 4 tokens exceeds a"
            )
            with pytest.raises(ValueError, match=f"{told} budget of 20 tokens"):
                PiKVCache(model, scheduler=wrapped, budget=20, window=4)
            PiKVCache(model, scheduler=wrapped, budget=21, window=4)
    with pytest.raises(ValueError, match="`interval` is 0"):
        PiKVCache(model, scheduler="knorm", budget=20, interval=0)


def test_amounts() -> None:
    assert parse_bytes("2GiB") == 2 * 1024**3 and parse_bytes("1.5 mb") == 1_500_000
    assert parse_bytes("300B") == 300 and parse_bytes("1 KiB") == 1024
    assert make_budget({"decode": 0.5}) == Budget(None, 0.5)
    assert make_budget("1GB") == Budget("1GB", "1GB")
    assert Budget(0.1, None).tokens(30, 10, int) == 12
    assert torch.inf > Budget("9B", None).tokens(30, 0, lambda nbytes: nbytes // 3) == 3


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", [LagKV(), PyramidKV(LagKV()), StreamingLLM()], ids=type_name)
def test_sinks_of_a_scheduler_are_within_the_budget(name, method) -> None:
    """A default window leaves room for them, and so does the smallest budget of a layer."""
    model = tiny(name)
    cache = PiKVCache(model, scheduler=method, budget=6, page_size=1)
    inputs = prompt(model, (40,))
    for _, tokens in read(cache, model, inputs, 30):
        totals = [layer.state.held_tokens() for layer in paged(cache)]
        assert sum(totals) / len(totals) <= 6 + cache.settings.page_size
        assert min(totals) >= 4 and tokens == totals[0]
