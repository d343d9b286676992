"""The demo's measurements: questions about a haystack, answered with several caches."""

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
from ..model.loading import GenerativeModel, encode, generate
from ..model.versions import BaseStreamer, DynamicLayer, cache_in
from ..requirements import VERSION
from ..storage.memory import storage_bytes, tensors_in
from .haystack import Haystack, make_haystack

SPARE_TOKENS = 2
"""Tokens that are generated beyond the length of the answer."""


@dataclass(frozen=True)
class Trial:
    """One question, answered with one cache.

    Bytes and ratios are measured after the last token; times are in seconds. `error` is the error
    of attention outputs, None if the cache does not measure it.
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
    """Results of one cache: counts of answers; medians over questions of all other numbers."""

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
    """Records when `generate` reads the prompt and when it emits each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def haystacks(
    tokenizer: PreTrainedTokenizerBase, *, length: int, needles: int, questions: int, seed: int
) -> list[Haystack]:
    """Return `questions` texts of `length` tokens with `needles` facts each."""

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
    """Answer the first question of each haystack with each cache, and yield the trials.

    Each question begins with another cache, so that a slow moment affects all caches alike.
    """
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
    """Generate an answer to the first question of `stack`, with a new cache of `option`."""
    inputs = encode(model, tokenizer, stack.prompt())
    spare = len(tokenizer(stack.answers[0], add_special_tokens=False).input_ids) + SPARE_TOKENS
    clock, cache = Clock(), option.make(model)
    out = generate(model, inputs, cache, clock, spare)
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
    """Return the fields of a `Trial` that say what `cache`, of any class, holds."""
    if isinstance(cache, PiKVCache):
        report = cache.report()
        names = ("nbytes", "bytes_per_token", "bf16_ratio", "error")
        return {name: getattr(report, name) for name in names}
    nbytes, in_bf16 = held_bytes(cache), 0
    for layer in cache.layers:
        can_be_bf16 = type(layer) is DynamicLayer
        for tensor in tensors_in(vars(layer)):
            in_bf16 += 2 * tensor.numel() if can_be_bf16 else tensor.nbytes
    ratio = in_bf16 / nbytes if nbytes else 1.0
    per_token = nbytes / max(cache.get_seq_length(), 1)
    return {"nbytes": nbytes, "bytes_per_token": per_token, "bf16_ratio": ratio, "error": None}


def summarize(trials: Sequence[Trial], caches: Sequence[CacheOption]) -> list[Row]:
    """Return a row for each cache, over the questions that all caches have answered."""
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
    """Return all that is needed to read and to repeat a run, ready for JSON."""
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
    """Return the bytes of the distinct storages that `cache`, of transformers, keeps alive."""
    return storage_bytes(tensors_in([vars(layer) for layer in cache.layers]))
