"""Which KV heads stream: those of `pikv profile`, beside every other choice of as many heads.

On the bundled model; the text is read, and so evicted from, before its question. An interrupted run
is continued when it is started again.
"""

import functools
import itertools
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from common import Result, start
from progress import Progress
from quality_cpu import Questions, wilson
from schedulers_cpu import AGNOSTIC, FULL, PAGE, WINDOW, measure
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from pikv_hf import PiKVCache
from pikv_hf.fitting.needle_texts import needle_pieces
from pikv_hf.fitting.profile import profile
from pikv_hf.fitting.profile_job import Job
from pikv_hf.fitting.resumable import write
from pikv_hf.model.artifact import ModelIdentity
from pikv_hf.model.loading import load
from pikv_hf.needles.haystack import NEEDLE_MODEL
from pikv_hf.schedulers.duo import PROFILE, SCORES, Duo, streaming_heads

SPARSITY, SINKS, RECENT = 0.5, 64, 256

Heads = tuple[tuple[int, int], ...]  # (layer, KV head) of those that stream


def chosen(model: PreTrainedModel, heads: Heads, folder: Path) -> Duo:
    """The scheduler in which these heads stream."""
    config = model.config
    scores = torch.ones(config.num_hidden_layers, config.num_key_value_heads)
    for layer, head in heads:
        scores[layer, head] = 0
    path = folder / "heads.safetensors"
    tensors = {f"{SCORES}{layer}": row.clone() for layer, row in enumerate(scores)}
    write(path, tensors, {"model": asdict(ModelIdentity.of(model))}, PROFILE.key)
    return Duo(path, SPARSITY, SINKS, RECENT)


def by_profile(model: PreTrainedModel, tokenizer: object, texts: int, folder: Path) -> Heads:
    job = Job(length=1024, texts=texts, sinks=SINKS, recent=RECENT)
    pieces = functools.partial(needle_pieces, tokenizer, job.length, job.texts)
    scores = profile(model, pieces, folder / "profile", job)
    streams = streaming_heads(scores, SPARSITY)
    return tuple((i, int(h)) for i, row in streams.items() for h in row.nonzero().flatten())


def title(heads: Heads) -> str:
    return " and ".join(f"head {head} of layer {layer}" for layer, head in heads)


def main() -> None:
    quick = start(__doc__)
    lengths, count, texts = ((1024,), 16, 2) if quick else ((1024, 2048), 200, 32)
    model, tokenizer = load(str(NEEDLE_MODEL))
    model = model.to(torch.bfloat16)
    config = model.config
    every = [
        (layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_key_value_heads)
    ]
    choices = list(itertools.combinations(every, round(SPARSITY * len(every))))
    progress = Progress("duo_cpu", lengths, count, texts)
    cells: dict[Heads | None, list[tuple[int, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(lengths) * len(choices)) as bar:
        best = by_profile(model, tokenizer, texts, Path(folder))
        for heads in (None, *choices[: 2 if quick else None]):
            cells[heads] = []
            for length in lengths:
                questions = Questions.of(tokenizer, length, count)
                make = DynamicCache
                if heads is not None:
                    duo = chosen(model, heads, Path(folder))
                    make = functools.partial(
                        PiKVCache, model, scheduler=duo, page_size=PAGE, window=WINDOW
                    )
                run = functools.partial(measure, model, make, questions, AGNOSTIC)
                cells[heads].append(progress.get(f"{heads}, {length}", run))
                bar.update(heads is not None)
    low, high = (100 * share for share in wilson(count // 2, count))
    result = Result(
        "duo_cpu",
        "DuoAttention: which heads stream",
        f"bundled model in bf16; {count} texts, 8 numbers hidden in each and one asked for; exact "
        f"answers in % (an interval of 95 %, Wilson, is at most {high - low:.0f} points wide), and in "
        f"brackets bytes held in % of a full cache; {len(best)} of {len(every)} KV heads stream, with "
        f"{SINKS} sinks and {RECENT} recent tokens; profile of {texts} other texts of 1024 tokens; "
        f"pages of {PAGE}, window {WINDOW}",
        ["streaming heads", *(f"{length} tokens" for length in lengths)],
    )
    for heads, row in cells.items():
        name = (
            FULL if heads is None else title(heads) + (": by the profile" if heads == best else "")
        )
        result.add(name, *(f"{100 * n / count:.1f} ({100 * share:.0f})" for n, share in row))
    if not quick:
        means = [
            statistics.mean(cells[heads][i][0] for heads in choices) for i in range(len(lengths))
        ]
        result.add("mean of all choices: random heads", *(f"{100 * m / count:.1f}" for m in means))
        gained = [100 * (cells[best][i][0] - m) / count for i, m in enumerate(means)]
        text = "the profile's heads: more answers than random heads, least points of a column"
        result.goal(text, min(gained), min(gained) > 0)
    result.publish(quick)
    progress.done()


if __name__ == "__main__":
    main()
