"""What each compressor costs in answers of the bundled model, beside transformers' QuantizedCache.

Each text is read first, so that it is compressed, and then its question: every answer is given
from the compressed text. An interrupted run is continued when it is started again. A --quick run
leaves transformers' caches out (the first use of quanto compiles C++).
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from common import Result, start
from compressors_cpu import uncalibrated
from peers import GROUP, Peer, innermost, quantized_bytes
from progress import Progress
from sealed import encoded_bytes
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pikv_hf import PiKVCache
from pikv_hf.compressors import Compressor, Fp8, Identity, Int2, Int4, Int8, TurboQuant
from pikv_hf.layer.loss_guard import LossWarning
from pikv_hf.model.loading import load
from pikv_hf.model.versions import with_cache
from pikv_hf.needles.haystack import NEEDLE_MODEL, Haystack, make_haystack

PAGE, WINDOW = 64, 16
NEEDLES, SEED = 8, 3_000_000
TOKENS_AT_ONCE = 16384
MOST_LOST = 1.0  # points of exact answers
GOALS = ("int8", "int4")
FULL = "full cache (DynamicCache)"


def titled(*peers: Peer) -> dict[str, Peer]:
    return {peer.title: peer for peer in peers}


ROWS: dict[str, Compressor | Peer] = {
    "identity": Identity(),
    "int8": Int8(),
    "fp8": Fp8(),
    **titled(Peer("hqq", 8), Peer("fp8", 8)),
    "int4": Int4(),
    "int4, not rotated": Int4(rotate=False),
    "turboquant, 4 bits": TurboQuant(bits=4),
    **titled(Peer("quanto", 4), Peer("hqq", 4)),
    "turboquant, 3 bits": TurboQuant(bits=3),  # hqq cannot read caches of 3 bits
    "int2": Int2(),
    "turboquant, 2 bits": TurboQuant(bits=2),
    **titled(Peer("quanto", 2), Peer("hqq", 2), Peer("quanto", 2, 32), Peer("hqq", 2, 32)),
}


@dataclass(frozen=True)
class Questions:
    """Texts [n, T] with a question [n, Q] and its answer [n, A] each, as tokens."""

    texts: Tensor
    questions: Tensor
    answers: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> "Questions":
        """`count` questions; a text, its question and room for a reply are `length` tokens."""
        seeds = range(SEED, SEED + count)
        stacks = [make_haystack(length=length, needles=NEEDLES, seed=seed) for seed in seeds]
        parts: list[Callable[[Haystack], str]] = [
            lambda stack: stack.text,
            lambda stack: stack.questions[0],
            lambda stack: stack.answers[0],
        ]
        return cls(*(torch.tensor(tokenizer([p(s) for s in stacks]).input_ids) for p in parts))

    def batches(self) -> list["Questions"]:
        rows = TOKENS_AT_ONCE // self.texts.shape[1] // 8 * 8  # hqq cannot pack odd numbers
        parts = (t.split(rows) for t in (self.texts, self.questions, self.answers))
        return [Questions(*batch) for batch in zip(*parts, strict=True)]


class Cell(NamedTuple):
    """One cache over the questions of one length; `nbytes` is held for each element seen."""

    right: int
    divergence: float
    nbytes: float


def ask(model: PreTrainedModel, cache: Cache, batch: Questions) -> Tensor:
    """Log-probabilities [n, A, V] of the tokens of the answers, the right one before each given."""
    read = functools.partial(model, **with_cache(cache), logits_to_keep=1)
    read(batch.texts)
    pieces = [batch.questions, *batch.answers[:, :-1].split(1, dim=1)]
    logits = torch.cat([read(piece).logits for piece in pieces], dim=1)
    return logits.double().log_softmax(-1)


def measure(
    model: PreTrainedModel, make: Callable[[], Cache], questions: Questions, full: list[Tensor]
) -> Cell:
    """`full` has the log-probabilities of a full cache, batch by batch."""
    right, divergence, nbytes = 0, 0.0, 0.0
    for batch, expected in zip(questions.batches(), full, strict=True):
        cache = make()
        seen = ask(model, cache, batch)
        right += int((seen.argmax(-1) == batch.answers).all(-1).sum())
        divergence += float((expected.exp() * (expected - seen)).sum())
        nbytes = held_bytes(cache) / elements(model.config, len(batch.texts), cache)
        if isinstance(cache, PiKVCache):
            cache.detach()
    return Cell(right, divergence / questions.answers.numel(), nbytes)


def elements(config: Any, rows: int, cache: Cache) -> int:
    """Numbers that a full cache would hold of what `cache` has seen."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * per_token * cache.get_seq_length()


def held_bytes(cache: Cache) -> int:
    if isinstance(cache, PiKVCache):
        return cache.nbytes
    held = innermost([vars(layer) for layer in cache.layers])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


def code_bytes(model: PreTrainedModel, method: Compressor | Peer, texts: Tensor) -> float:
    """Bytes of an encoded element, with its share of scales and zeros, of the texts [n, T]."""
    cache, config = maker(model, method)(), model.config
    model(texts, **with_cache(cache), logits_to_keep=1)
    if isinstance(cache, PiKVCache):
        pages = [encoded_bytes(layer.state.pages) for layer in cache.layers]
        cache.detach()
        return sum(pages) / len(pages) / (2 * PAGE * config.head_dim)
    return sum(map(quantized_bytes, cache.layers)) / elements(config, len(texts), cache)


def maker(model: PreTrainedModel, method: Compressor | Peer) -> Callable[[], Cache]:
    if isinstance(method, Peer):
        return functools.partial(method.cache, model.config, WINDOW + PAGE)
    return functools.partial(PiKVCache, model, compressor=method, page_size=PAGE, window=WINDOW)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return middle - half, middle + half


def measure_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: dict[str, Compressor | Peer],
    lengths: tuple[int, ...],
    count: int,
    progress: Progress,
) -> dict[str, list[Cell]]:
    """For each cache a cell for each length, the full cache first."""
    makers = {FULL: DynamicCache} | {name: maker(model, m) for name, m in methods.items()}
    cells: dict[str, list[Cell]] = {name: [] for name in makers}
    with tqdm(total=len(lengths) * len(makers)) as bar:
        for length in lengths:
            questions = Questions.of(tokenizer, length, count)
            full = [ask(model, DynamicCache(), batch) for batch in questions.batches()]
            for name, make in makers.items():
                bar.set_description(f"{length} tokens, {name}")
                run = functools.partial(measure, model, make, questions, full)
                cells[name].append(Cell(*progress.get(f"{name}, {length}", run)))
                bar.update()
    return cells


def shown(cells: list[Cell], count: int) -> list[str]:
    """The cells of a row: answers by length and in all, divergence."""
    total = len(cells) * count
    right = sum(cell.right for cell in cells)
    low, high = (100 * share for share in wilson(right, total))
    mean = sum(cell.divergence for cell in cells) / len(cells)
    shares = [f"{100 * cell.right / count:.1f}" for cell in cells]
    return [*shares, f"{100 * right / total:.1f} [{low:.1f}, {high:.1f}]", f"{mean:.2g}"]


def setting(model: PreTrainedModel, lengths: tuple[int, ...], count: int) -> str:
    return (
        f"bundled model in {str(model.dtype).removeprefix('torch.')}; for each length {count} texts, "
        f"{NEEDLES} numbers hidden in each and one asked for; the text is read, then its question, "
        f"then the answer word by word, at most {TOKENS_AT_ONCE} tokens at once; bytes of codes and "
        "scales, and how much larger bf16 and fp32 are; how much larger a full cache is than all "
        f"that is held at {lengths[-1]} tokens; exact: % of answers [95 % interval, Wilson]; KL: from "
        "the next-token distribution of a full cache to that of this one, mean over the words of all "
        f"answers; ours: pages of {PAGE}, the newest {WINDOW} to {WINDOW + PAGE} tokens as they are; "
        "quanto, hqq and transformers: its QuantizedCache (version of the package that quantizes), "
        f"groups of {GROUP}, the whole text quantized, residual_length {WINDOW + PAGE}"
    )


def add_row(
    result: Result, name: str, size: float, full_size: int, cells: list[Cell], count: int
) -> None:
    """Bytes of an element: `size` of an encoded one, `full_size` of one of a full cache."""
    ratios = [2 / size, 4 / size, full_size / cells[-1].nbytes]
    result.add(name, f"{size:.4f}", *(f"{r:.2f}x" for r in ratios), *shown(cells, count))


def main() -> None:
    quick = start(__doc__)
    warnings.simplefilter("ignore", LossWarning)
    lengths, count = ((512,), 32) if quick else ((512, 1024, 2048), 200)
    model, tokenizer = load(str(NEEDLE_MODEL))
    methods = {n: m for n, m in ROWS.items() if not (quick and isinstance(m, Peer))}
    methods |= {n: m for n, m in uncalibrated().items() if m not in ROWS.values()}
    usable = {n: m for n, m in methods.items() if not isinstance(m, Peer) or m.version}
    progress = Progress("quality_cpu", list(usable), lengths, count)
    cells = measure_all(model, tokenizer, usable, lengths, count, progress)
    result = Result(
        "quality_cpu",
        "Compressors: answers of the bundled model",
        setting(model, lengths, count),
        ["cache", "bytes/element", "bf16 is", "fp32 is", "full cache is"]
        + [f"exact, {length}" for length in lengths]
        + ["exact, all", "KL, nats"],
    )
    full_size = model.dtype.itemsize
    texts = Questions.of(tokenizer, lengths[-1], 8).texts
    add_row(result, FULL, full_size, full_size, cells[FULL], count)
    for name, method in methods.items():
        if name in usable:
            size = code_bytes(model, method, texts)
            add_row(result, name, size, full_size, cells[name], count)
        else:
            result.add(name, *[""] * (len(result.columns) - 1))
    for name in GOALS:
        right = [sum(cell.right for cell in cells[cache]) for cache in (FULL, name)]
        lost = 100 * (right[0] - right[1]) / (count * len(lengths))
        result.goal(f"{name}: <= {MOST_LOST} points of exact answers lost", lost, lost <= MOST_LOST)
    result.publish(quick)
    progress.done()


if __name__ == "__main__":
    main()
