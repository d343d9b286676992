"""What eviction costs: dropping half of 64k tokens, decoding from what is left, an endless stream.

The peer drops tokens as kvpress 0.5's ScorerPress does: `topk`, then `gather` with an index as wide
as keys and values. Both are given the same scores, or both score by the norm of the keys.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from append_cpu import one_layer_model
from common import Result, Timing, random_states, start, write
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, Qwen3MoeForCausalLM

from pikv_hf import SCHEDULERS, PiKVCache
from pikv_hf.attention.function import attend
from pikv_hf.layer.handoff import take_layer
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import Candidates, Knorm, Scheduler

SHAPE, GROUPS, SCALE = (4, 128, 128), 8, 128**-0.5
TOKENS, PAGE, WINDOW = 65536, 64, 128
FASTER = 4.0
BUDGET, STEPS = 4096, 256
DECODE_MOST = 1.05
# As many weights as a token meets in a layer of Qwen3-30B-A3B: 8 experts, but of 16.
DECODER_LAYER = {
    "hidden_size": 2048,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
# Schedulers that one layer at a given budget says nothing of: `fastv` keeps the first layers whole, `duo`
# takes no budget, `pikv_quest` wants a calibration.
LEFT_OUT = {"fastv", "duo", "pikv_quest"}
# A stream has a narrower layer, so that it ends within minutes.
STREAM, STREAM_SHAPE, CHUNK = 100_000, (2, 64, 64), 500
BYTES_MOST, TIME_MOST = 1.05, 1.1

Prepared = Callable[[], Callable[[], object]]


@dataclass(frozen=True, eq=False)
class Halving(Scheduler):
    """Keeps all of `whole` tokens, and half of them as soon as there is one more; scores are given.

    Without scores, those of `Knorm`.
    """

    whole: int
    given: Tensor | None

    def budget(self, seen: int) -> int:
        return self.whole if 0 < seen <= self.whole else TOKENS // 2

    def scores(self, tokens: Candidates) -> Tensor:
        if self.given is None:
            return Knorm().scores(tokens)
        return self.given[:, :, : tokens.keys.shape[2]]


def timed(steps: dict[str, Prepared], rounds: int) -> dict[str, list[float]]:
    """Seconds of what each step returns, in interleaved rounds: what prepares it is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            act = steps[name]()
            begin = time.process_time()
            act()
            elapsed = time.process_time() - begin
            if number:
                seconds[name].append(elapsed)
    return seconds


def timed_in_turn(caches: dict[str, Prepared], rounds: int) -> dict[str, list[float]]:
    """Seconds of `STEPS` steps of each cache, which take their steps in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    names = list(caches)
    for number in range(rounds + 1):
        steps = {name: prepare() for name, prepare in caches.items()}
        spent = dict.fromkeys(names, 0.0)
        for at in range(STEPS):
            turn = at % len(names)
            for name in names[turn:] + names[:turn]:
                begin = time.process_time()
                steps[name]()
                spent[name] += time.process_time() - begin
        if number:
            for name in names:
                seconds[name].append(spent[name])
    return seconds


def press(layer: Any, scores: Tensor | None) -> None:
    """Half of a DynamicLayer's tokens, as kvpress chooses and moves them."""
    if scores is None:
        scores = -layer.keys.norm(dim=-1)
    kept = scores.topk(TOKENS // 2, dim=-1).indices
    kept = kept.unsqueeze(-1).expand(-1, -1, -1, SHAPE[1])
    layer.keys = layer.keys.gather(2, kept).contiguous()
    layer.values = layer.values.gather(2, kept).contiguous()


def halvings(
    model: Qwen3MoeForCausalLM, dtype: torch.dtype, scores: Tensor | None
) -> dict[str, Prepared]:
    """The peer, and ours: of a prompt that is being sealed, of pages, and compressed as well."""
    keys, values = random_states(0, TOKENS, SHAPE, dtype)
    more = random_states(1, PAGE, SHAPE, dtype)

    def peer() -> Callable[[], object]:
        layer = DynamicCache(config=model.config).layers[0]
        layer.update(keys, values)
        return lambda: press(layer, scores)

    def ours(whole: int, compressor: str | None) -> Prepared:
        def prepare() -> Callable[[], object]:
            scheduler = Halving(whole, scores)
            options = {"scheduler": scheduler, "compressor": compressor, "window": WINDOW}
            layer = PiKVCache(model, page_size=PAGE, **options).layers[0]
            if not whole:
                return lambda: write(layer, keys, values)
            write(layer, keys, values)
            return lambda: write(layer, *more)

        return prepare

    return {
        "peer": peer,
        "prompt": ours(0, None),
        "pages": ours(TOKENS, None),
        **({"prompt, int4": ours(0, "int4")} if dtype == torch.bfloat16 else {}),
    }


def check_same_kept(model: Qwen3MoeForCausalLM, scores: Tensor) -> None:
    """Both keep the same keys, ours in order; the newest tokens must have the highest scores.

    Of scores that differ by less than 2^-16, ours keeps the newer ones.
    """
    keys, values = random_states(0, TOKENS, SHAPE, torch.float32)
    layer = PiKVCache(model, scheduler=Halving(0, scores), window=WINDOW).layers[0]
    write(layer, keys, values)
    (span,) = layer.state.pages.spans([0])
    found = torch.cat([span["keys"], layer.state.tail.view()[0]], dim=2)
    opened = torch.arange(layer.state.first_in_tail, TOKENS)
    lowest = scores.topk(TOKENS // 2, dim=-1).values[0, :, -1:]
    for head in range(SHAPE[0]):
        kept = torch.cat([span["positions"][0, head].long(), opened])
        assert (kept.diff() > 0).all() and torch.equal(keys[0, head, kept], found[0, head])
        assert (scores[0, head, kept] >= lowest[head] * (1 - 2**-15)).all()


def halve(result: Result, quick: bool) -> None:
    """Rows of the first kind."""
    model = one_layer_model(SHAPE)
    scores = torch.rand(1, SHAPE[0], TOKENS, generator=torch.Generator().manual_seed(0))
    scores[:, :, -WINDOW:] = torch.inf
    check_same_kept(model, scores)
    for dtype in (torch.bfloat16, torch.float32):
        for kind, given in (("given scores", scores), ("norm of keys", None)):
            seconds = timed(halvings(model, dtype, given), 3 if quick else 7)
            times = {name: Timing.of(values) for name, values in seconds.items()}
            peer = times.pop("peer")
            name = str(dtype).removeprefix("torch.")
            for what, ours in times.items():
                faster = peer.median / ours.median
                cells = [f"{t.median:.1f} ({t.least:.1f})" for t in (peer, ours)]
                result.add(f"half of 64k: {what}", f"{name}, {kind}", *cells, f"{faster:.2f}x")
                if what == "prompt":
                    goal = (
                        f"half of 64k tokens, {name}, {kind}: >= {FASTER:.0f}x faster than the peer"
                    )
                    result.goal(goal, faster, faster >= FASTER)


def step(layer: Any, states: tuple[Tensor, Tensor], query: Tensor, scale: float) -> None:
    """One token of one layer, as the attention function does it."""
    layer.update(*states)
    assert take_layer() is layer
    attend(layer.state, None, query, None, scale)
    if layer.state.observed.limit:
        layer.observe(query, scale)
    layer.finish()


def filled(model: Qwen3MoeForCausalLM, scheduler: str | None, compressor: str | None) -> Any:
    """A cache that is about to decode `STEPS` tokens at a budget of `BUDGET`, of 64k, or one that

    drops nothing and holds `BUDGET` tokens on the average of these steps.
    """
    budget = None if scheduler is None else BUDGET
    options = {"compressor": compressor, "page_size": PAGE, "window": WINDOW}
    cache = PiKVCache(model, scheduler=scheduler, budget=budget, **options)
    layer: Any = cache.layers[0]
    tokens = TOKENS if scheduler else BUDGET - STEPS // 2
    layer.update(*random_states(0, tokens, SHAPE, torch.bfloat16))
    assert take_layer() is layer
    if layer.state.observed.limit:
        query = torch.randn(1, SHAPE[0] * GROUPS, 64, SHAPE[1])
        layer.observe(query.to(torch.bfloat16), SCALE)
    layer.finish()
    if cache.settings.needs_labels:
        chosen = 1, tokens, DECODER_LAYER["num_experts_per_tok"]
        layer.label(torch.randint(DECODER_LAYER["num_experts"], chosen), torch.rand(chosen))
    return cache


def decoding(cache: Any, one_step: Callable[[], object]) -> Prepared:
    """A step. In `STEPS` of them, the interval, what is dropped goes once."""
    for _ in range(STEPS):
        one_step()

    def prepare() -> Callable[[], object]:
        if cache.settings.scheduler is None:
            cache.crop(-STEPS)
        return one_step

    return prepare


def attending(model: Qwen3MoeForCausalLM, *methods: str | None) -> Prepared:
    """Steps of append and attention."""
    one = random_states(2, 1, SHAPE, torch.bfloat16)
    query = torch.randn(1, SHAPE[0] * GROUPS, 1, SHAPE[1]).to(torch.bfloat16)
    cache = filled(model, *methods)
    return decoding(cache, lambda: step(cache.layers[0], one, query, SCALE))


def running(model: Qwen3MoeForCausalLM, *methods: str | None) -> Prepared:
    """Steps of the model."""
    cache = filled(model, *methods)
    ids = torch.zeros(1, 1, dtype=torch.int64)

    @torch.no_grad()
    def forward() -> object:
        return model(input_ids=ids, **with_cache(cache))

    return decoding(cache, forward)


def decode(result: Result, quick: bool) -> None:
    """Rows of the second kind: of what the cache does, and of a decoder layer."""
    small = one_layer_model(SHAPE)
    whole = one_layer_model(SHAPE, **DECODER_LAYER).bfloat16()
    schedulers = ("knorm", "snapkv", "h2o", "adakv")
    every = tuple(sorted(SCHEDULERS.keys() - LEFT_OUT))
    for compressor, in_layer in ((None, every), ("int4", schedulers[-1:])):
        for model, what, steps, names in (
            (small, "step", attending, schedulers),
            (whole, "decoder layer", running, in_layer),
        ):
            runs = {name or "never more": steps(model, name, compressor) for name in (None, *names)}
            seconds = timed_in_turn(runs, 2 if quick else 5)
            plain = seconds.pop("never more")
            for name, ours in seconds.items():
                ratio = median(one / other for one, other in zip(ours, plain, strict=True))
                times = map(Timing.of, (plain, ours))
                cells = [f"{t.median / STEPS:.3f} ({t.least / STEPS:.3f})" for t in times]
                case = f"{what} at 4k of 64k: {name}"
                kind = compressor or "identity"
                result.add(case, f"bfloat16, {kind}", *cells, f"{ratio:.3f}x the time")
                goal = f"{case}, {kind}: <= {DECODE_MOST}x of a cache of 4k tokens"
                result.goal(goal, ratio, ratio <= DECODE_MOST)


class Stream:
    """Decoding without an end, at a budget of `BUDGET` tokens."""

    def __init__(self, scheduler: str, compressor: str | None) -> None:
        options = {"compressor": compressor, "page_size": PAGE, "window": WINDOW}
        model = one_layer_model(STREAM_SHAPE)
        self.cache = PiKVCache(model, scheduler=scheduler, budget=BUDGET, **options)
        self.held: list[int] = []
        write(self.cache.layers[0], *random_states(0, PAGE, STREAM_SHAPE, torch.bfloat16))

    def chunk(self) -> float:
        """Milliseconds per token of the next `CHUNK` tokens; notes what is held behind them."""
        states = random_states(len(self.held) + 1, CHUNK, STREAM_SHAPE, torch.bfloat16)
        tokens = list(zip(*(t.split(1, 2) for t in states), strict=True))
        query = torch.randn(1, STREAM_SHAPE[0] * GROUPS, 1, STREAM_SHAPE[1]).to(torch.bfloat16)
        begin = time.process_time()
        for one in tokens:
            step(self.cache.layers[0], one, query, STREAM_SHAPE[1] ** -0.5)
        spent = time.process_time() - begin
        self.held.append(self.cache.nbytes)
        return 1e3 * spent / CHUNK


def streams(result: Result, quick: bool) -> None:
    """Rows of the third kind: a stream near its end, interleaved with one near its beginning."""
    tokens = STREAM // 3 if quick else STREAM
    count = tokens // CHUNK
    for scheduler, compressor in (("streaming_llm", None), ("knorm", None)):
        young, old = Stream(scheduler, compressor), Stream(scheduler, compressor)
        for _ in range(count // 10):
            young.chunk()
        for _ in tqdm(range(count - count // 10), desc=f"{scheduler}, {compressor}"):
            old.chunk()
        pairs = [(young.chunk(), old.chunk()) for _ in range(count // 10)]
        second, last = (median(times) for times in zip(*pairs, strict=True))
        full = old.held[-(-(BUDGET + WINDOW + PAGE) // CHUNK) :]
        grown, slower = max(full) / min(full), last / second
        name = f"{scheduler}, {compressor or 'identity'}"
        result.add(
            f"stream of {tokens // 1000}k", name, f"{second:.3f}", f"{last:.3f}", f"{slower:.3f}x"
        )
        result.goal(
            f"stream, {name}: bytes, most / least <= {BYTES_MOST}", grown, grown <= BYTES_MOST
        )
        goal = f"stream, {name}: time of the last tenth <= {TIME_MOST}x of the second tenth"
        result.goal(goal, slower, slower <= TIME_MOST)


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "eviction_cpu",
        "Eviction: dropping half, decoding at a budget, an endless stream",
        "one layer, batch 1, ms, median (least) of interleaved rounds, 1 thread, process CPU time. "
        f"Half of 64k: 4 KV heads of 128; the peer against ours, which keeps the newest {WINDOW} and "
        "seals the others, of a prompt or of 64k tokens that are pages already. Step at 4k: append "
        f"and attention of 32 query heads, mean over {STEPS} steps with what is dropped in "
        "them, once; caches take their steps in turn; median ratio of a round; a "
        "cache that holds 4k tokens on their average and drops none, against one that has dropped the "
        "others of 64k. Stream: a budget of 4096 tokens, 2 KV heads of 64, 16 query heads, per token in the "
        "second tenth of one stream and in the last of another, median of interleaved chunks of 500 tokens",
        ["what", "case", "peer, or before", "ours, or after", "ratio"],
    )
    halve(result, quick)
    decode(result, quick)
    streams(result, quick)
    result.publish(quick)


if __name__ == "__main__":
    main()
