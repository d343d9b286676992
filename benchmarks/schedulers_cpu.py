"""What each scheduler costs in answers of the bundled model, at several budgets.

Question-agnostic: the text is read, and so evicted from, before its question. Question-aware: text
and question are read together, all but the question's last token. An interrupted run is continued
when it is started again.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from common import OUT, Result, start
from matplotlib.figure import Figure
from progress import Progress
from quality_cpu import Questions, elements, held_bytes, wilson
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from pikv_hf import SCHEDULERS, PiKVCache
from pikv_hf.demo import load
from pikv_hf.needles import NEEDLE_MODEL
from pikv_hf.schedulers import FastV

PAGE, WINDOW, LENGTH = 16, 16, 1024
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
COMPRESSORS = (None, "int4")
AGNOSTIC, AWARE = "agnostic", "aware"
FULL = "full cache (DynamicCache)"
BEST_LEAST, BEST_BYTES = 0.95, 0.125
# The bundled model has two layers.
SETTINGS = {"fastv": FastV(layer=1)}


def ask(model: PreTrainedModel, cache: Cache, batch: Questions, mode: str) -> Tensor:
    """The tokens [n, A] that the model answers, the right one before each given."""
    read = functools.partial(model, past_key_values=cache, logits_to_keep=1)
    text, asked = batch.texts, batch.questions
    if mode == AWARE:
        text, asked = torch.cat([text, asked[:, :-1]], dim=1), asked[:, -1:]
    # What is held and read at once ends as what is not held; kvzip insists on it.
    with cache.holding() if isinstance(cache, PiKVCache) else contextlib.nullcontext():
        read(text)
    pieces = [asked, *batch.answers[:, :-1].split(1, dim=1)]
    return torch.cat([read(piece).logits for piece in pieces], dim=1).argmax(-1)


def measure(
    model: PreTrainedModel, make: Callable[[], Cache], questions: Questions, mode: str
) -> tuple[int, float]:
    """Right answers, and bytes held for each byte of a full cache in bf16."""
    right, share = 0, 0.0
    for batch in questions.batches():
        cache = make()
        right += int((ask(model, cache, batch, mode) == batch.answers).all(-1).sum())
        share = held_bytes(cache) / elements(model.config, len(batch.texts), cache) / 2
        if isinstance(cache, PiKVCache):
            cache.detach()
    return right, share


def cases(names: list[str]) -> dict[str, dict[str, object]]:
    """The caches to measure, by name: options of PiKVCache and the mode."""
    out: dict[str, dict[str, object]] = {}
    for name in names:
        for compressor in COMPRESSORS:
            for budget in BUDGETS:
                for mode in (AGNOSTIC, AWARE) if compressor is None else (AGNOSTIC,):
                    scheduler = SETTINGS.get(name, name)
                    options = {"scheduler": scheduler, "budget": budget, "compressor": compressor}
                    out[f"{name}, {budget}, {compressor}, {mode}"] = options | {"mode": mode}
    return out


def main() -> None:
    quick = start(__doc__)
    every = [name for name, method in SCHEDULERS.items() if not method.needs_file]
    count, names = (16, ["keydiff", "random"]) if quick else (200, every)
    model, tokenizer = load(str(NEEDLE_MODEL))
    model = model.to(torch.bfloat16)
    questions = Questions.of(tokenizer, LENGTH, count)
    progress = Progress("schedulers_cpu", names, count)
    full = progress.get(FULL, lambda: measure(model, DynamicCache, questions, AGNOSTIC))
    found = {}
    for title, case in tqdm(cases(names).items()):
        mode = str(case.pop("mode"))
        make = functools.partial(PiKVCache, model, page_size=PAGE, window=WINDOW, **case)
        found[title] = progress.get(title, functools.partial(measure, model, make, questions, mode))
    result = table(names, found, full, count)
    best = max((right for right, share in found.values() if share <= BEST_BYTES), default=0)
    goal = f"the best keeps >= {BEST_LEAST:.0%} of the answers at <= {BEST_BYTES:.1%} of the bytes"
    result.goal(goal, best / full[0], best >= BEST_LEAST * full[0])
    result.publish(quick)
    if not quick:
        picture(names, found, full, count)
    progress.done()


def table(
    names: list[str], found: dict[str, tuple[int, float]], full: tuple[int, float], count: int
) -> Result:
    shares = [f"{budget:.4g}" for budget in BUDGETS]
    low, high = (100 * share for share in wilson(count // 2, count))
    result = Result(
        "schedulers_cpu",
        "Schedulers: answers of the bundled model",
        f"bundled model in bf16; {count} texts of {LENGTH} tokens, 8 numbers hidden in each and one "
        f"asked for; exact answers in % (an interval of 95 % is at most {high - low:.0f} points "
        "wide), and in brackets bytes held, everything counted, in % of a full cache in bf16; ours: "
        f"pages of {PAGE}, the newest {WINDOW} to {WINDOW + PAGE - 1} tokens always stay",
        ["scheduler", "compressor", "question", *shares],
    )
    result.add(FULL, "", "", f"{100 * full[0] / count:.1f} ({100 * full[1]:.0f})", "", "", "")
    for name in names:
        for compressor in COMPRESSORS:
            for mode in (AGNOSTIC, AWARE) if compressor is None else (AGNOSTIC,):
                cells = [found[f"{name}, {b}, {compressor}, {mode}"] for b in BUDGETS]
                shown = [f"{100 * right / count:.1f} ({100 * share:.0f})" for right, share in cells]
                result.add(name, compressor or "", mode, *shown)
    return result


def picture(
    names: list[str], found: dict[str, tuple[int, float]], full: tuple[int, float], count: int
) -> None:
    """Accuracy against bytes of every scheduler with int4, question-agnostic: one line each."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        cells = [found[f"{name}, {budget}, int4, {AGNOSTIC}"] for budget in BUDGETS]
        memory = [100 * share for _, share in cells]
        axes.plot(memory, [100 * right / count for right, _ in cells], "o-", label=name)
    axes.axhline(100 * full[0] / count, color="grey", ls=":", label="full cache, bf16")
    axes.set(xlim=(0, None), ylim=(0, 103), xlabel="bytes held, % of a full cache in bf16")
    axes.set(ylabel="exact answers, %")
    axes.set_title(
        f"int4 with a scheduler: {count} texts of {LENGTH} tokens, read before the question"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(OUT / "schedulers_cpu.png")


if __name__ == "__main__":
    main()
