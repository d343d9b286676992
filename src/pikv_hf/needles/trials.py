"""The main job: needles in a haystack, found with several caches. Measures; prints nothing."""

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..cache.from_text import CacheOption
from ..cache.pikv_cache import PiKVCache
from ..model.loading import GenerativeModel, encode
from ..model.versions import BaseStreamer, DynamicLayer, cache_in, with_cache
from ..requirements import VERSION
from ..storage.memory import storage_bytes, tensors_in
from .haystack import Haystack, make_haystack

SPARE_TOKENS = 2
"""Tokens of a reply beyond those of the answer."""


@dataclass(frozen=True)
class Trial:
    """One question answered with one cache; times in seconds, what it holds after the last token.

    `error` is that of attention outputs, if the cache was to measure it.
    """

    cache: str
    question: int
    answer: str
    reply: str
    exact: bool
    nbytes: int
    bytes_per_token: float
    bf16_ratio: float
    error: float | None
    first_token_s: float
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One cache over all questions: sums of answers, medians of bytes, ratios, errors and times."""

    cache: str
    questions: int
    exact: int
    nbytes: int
    ratio: float
    bytes_per_token: float
    bf16_ratio: float
    error: float | None
    decode_tokens_per_s: float | None
    first_token_s: float


class Clock(BaseStreamer):
    """The times at which `generate` took the prompt and handed over each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def haystacks(
    tokenizer: PreTrainedTokenizerBase, *, length: int, needles: int, questions: int, seed: int
) -> list[Haystack]:
    """`questions` texts of `length` tokens with `needles` facts each, of which one is asked for."""

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    return [
        make_haystack(length=length, needles=needles, seed=seed + i, count=count)
        for i in range(questions)
    ]


def run(
    model: GenerativeModel,
    tokenizer: PreTrainedTokenizerBase,
    caches: Sequence[CacheOption],
    stacks: Sequence[Haystack],
) -> Iterator[Trial]:
    """Every question with every cache. Caches take turns, so that a slow moment hits all alike."""
    for number, stack in enumerate(stacks):
        first = number % len(caches)
        for option in (*caches[first:], *caches[:first]):
            yield answer(model, tokenizer, option, stack, number)


def answer(
    model: GenerativeModel,
    tokenizer: PreTrainedTokenizerBase,
    option: CacheOption,
    stack: Haystack,
    number: int = 0,
) -> Trial:
    """Ask the first question of `stack`."""
    inputs = encode(model, tokenizer, stack.prompt())
    spare = len(tokenizer(stack.answers[0], add_special_tokens=False).input_ids) + SPARE_TOKENS
    clock, cache = Clock(), option.make(model)
    out = model.generate(
        **inputs,
        **with_cache(cache),
        max_new_tokens=spare,
        streamer=clock,
        return_dict_in_generate=True,
    )
    steps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    new_tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    reply = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)[0]
    trial = Trial(
        cache=option.name,
        question=number,
        answer=stack.answers[0],
        reply=reply,
        exact=stack.is_exact(reply),
        **holdings(cache_in(out)),
        first_token_s=steps[0],
        step_s=tuple(steps[1:]),
    )
    if cache is not None:
        cache.detach()
    return trial


def holdings(cache: Cache) -> dict[str, Any]:
    """What a cache holds, as the `report` of a PiKVCache says it; for any cache."""
    if isinstance(cache, PiKVCache):
        report = cache.report()
        names = ("nbytes", "bytes_per_token", "bf16_ratio", "error")
        return {name: getattr(report, name) for name in names}
    nbytes = held_bytes(cache)
    in_bf16 = sum(
        sum(2 * tensor.numel() for tensor in tensors_in([layer.keys, layer.values]))
        if type(layer) is DynamicLayer
        else sum(tensor.nbytes for tensor in tensors_in(vars(layer)))
        for layer in cache.layers
    )
    per_token = nbytes / max(cache.get_seq_length(), 1)
    return {
        "nbytes": nbytes,
        "bytes_per_token": per_token,
        "bf16_ratio": in_bf16 / nbytes if nbytes else 1.0,
        "error": None,
    }


def summarize(trials: Sequence[Trial], caches: Sequence[CacheOption]) -> list[Row]:
    """A row for each cache, over the questions that all caches have answered."""
    names = [option.name for option in caches]
    of_question: dict[int, dict[str, Trial]] = {}
    for trial in trials:
        of_question.setdefault(trial.question, {})[trial.cache] = trial
    complete = [answers for answers in of_question.values() if len(answers) == len(names)]
    if not complete:
        return []
    full = statistics.median(answers[names[0]].nbytes for answers in complete)
    return [_row(name, [answers[name] for answers in complete], full) for name in names]


def _row(name: str, trials: Sequence[Trial], full: float) -> Row:
    steps = [step for trial in trials for step in trial.step_s]
    errors = [trial.error for trial in trials if trial.error is not None]
    nbytes = statistics.median(trial.nbytes for trial in trials)
    return Row(
        cache=name,
        questions=len(trials),
        exact=sum(trial.exact for trial in trials),
        nbytes=round(nbytes),
        ratio=full / nbytes,
        bytes_per_token=statistics.median(trial.bytes_per_token for trial in trials),
        bf16_ratio=statistics.median(trial.bf16_ratio for trial in trials),
        error=statistics.median(errors) if errors else None,
        decode_tokens_per_s=1 / statistics.median(steps) if steps else None,
        first_token_s=statistics.median(trial.first_token_s for trial in trials),
    )


def to_dict(
    model: PreTrainedModel,
    job: dict[str, Any],
    rows: Sequence[Row],
    trials: Sequence[Trial],
) -> dict[str, Any]:
    """Everything that is needed to read and to repeat a run, ready for JSON."""
    on_gpu = model.device.type == "cuda"
    return {
        **job,
        "versions": {
            "pikv_hf": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "device": torch.cuda.get_device_name(model.device) if on_gpu else str(model.device),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "dtype": str(model.dtype),
        "parameters": model.num_parameters(),
        "caches": [asdict(row) for row in rows],
        "trials": [asdict(trial) for trial in trials],
    }


def held_bytes(cache: Cache) -> int:
    """Bytes of the distinct storages that any cache keeps alive."""
    if isinstance(cache, PiKVCache):
        return cache.nbytes
    return storage_bytes(tensors_in([vars(layer) for layer in cache.layers]))
