"""What each scheduler costs in answers of the bundled model, at several budgets and lengths.

Question-agnostic: the text is read, and so evicted from, before its question. Question-aware: text
and question are read together, all but the question's last token. Every scheduler of the registry
enters by itself; one that this model or a budget does not suit is named with the reason. An
interrupted run is continued when it is started again.
"""

import functools
import multiprocessing
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from common import OUT, Result, start
from matplotlib.figure import Figure
from progress import Progress
from quality_cpu import Questions, elements, held_bytes, wilson
from remembered import remembered
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from pikv_hf import SCHEDULERS, PiKVCache
from pikv_hf.compressors import Compressor, TurboQuant
from pikv_hf.model.loading import load
from pikv_hf.model.versions import with_cache
from pikv_hf.needles.haystack import NEEDLE_MODEL
from pikv_hf.schedulers import Scheduler

PAGE, WINDOW, COUNT, PROCESSES = 16, 16, 512, 3
SHORT, LENGTH = 512, 1024
FULL, PICTURED = "full cache (DynamicCache)", "int4"
AGNOSTIC, AWARE = "agnostic", "aware"
MEASURES = [(LENGTH, AGNOSTIC), (SHORT, AGNOSTIC), (SHORT, AWARE)]
# What is measured with long texts as well: the best of a first run with short ones, and a control.
BEST = ("keydiff", "lagkv")
CHOSEN = (FULL, *BEST, "random")
TWO_BITS, FINE, COARSE = TurboQuant(bits=2), (0.45, 0.35, 0.25), (0.35, 0.28, 0.2)
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
BEST_LEAST, BEST_BYTES = 0.95, 0.125
# Where the defaults do not suit a model of two layers.
SUITED: dict[str, dict[str, Any]] = {
    "fastv": {"scheduler": SCHEDULERS["fastv"], "layer": 1},
}


@dataclass(frozen=True)
class Case:
    """One row of the table: a cache, or the full one."""

    name: str
    compressor: str | Compressor | None = None
    budget: float | None = None

    @property
    def compressor_name(self) -> str:
        if isinstance(self.compressor, TurboQuant):
            return f"turboquant, {self.compressor.bits} bits"
        return str(self.compressor or "")

    @property
    def is_slow(self) -> bool:
        """Whether it computes the attention of every query anew, for records of each token."""
        return self.budget is not None and bool(self.options["scheduler"].needs.statistics)

    @property
    def options(self) -> dict[str, Any]:
        """Those of PiKVCache."""
        options = dict(SUITED.get(self.name, {}))
        made: type[Scheduler] = options.pop("scheduler", SCHEDULERS[self.name])
        layer = {"layer": options.pop("layer")} if "layer" in options else {}
        common = {"budget": self.budget, "compressor": self.compressor}
        sizes = {"page_size": PAGE, "window": WINDOW}
        return options | common | sizes | {"scheduler": made(**layer)}

    def is_measured(self, length: int, mode: str) -> bool:
        """Not everything is: a slow case would take longer than all others."""
        if mode == AWARE:
            return self.budget is None or (self.compressor == PICTURED and not self.is_slow)
        return length == SHORT or self.name in CHOSEN

    def cache(self, model: PreTrainedModel) -> Cache:
        return DynamicCache() if self.budget is None else PiKVCache(model, **self.options)


def cases(names: list[str]) -> list[Case]:
    """All rows; the last ones are what might reach the goal, and one without compression."""
    extra: list[tuple[str, str | Compressor | None, tuple[float, ...]]] = [
        ("keydiff", None, BUDGETS),
        ("keydiff", "int4", COARSE),
        ("keydiff", TurboQuant(bits=3), COARSE),
        ("keydiff", "int2", FINE),
        *((name, TWO_BITS, FINE) for name in BEST),
    ]
    rows = [(name, PICTURED, BUDGETS) for name in names] + [row for row in extra if row[0] in names]
    return [Case(FULL)] + [Case(name, c, budget) for name, c, budgets in rows for budget in budgets]


def ask(model: PreTrainedModel, cache: Cache, batch: Questions, mode: str) -> Tensor:
    """The tokens [n, A] that the model answers, the right one before each given."""
    read = functools.partial(model, **with_cache(cache), logits_to_keep=1)
    asked, text = batch.questions, batch.texts
    if mode == AWARE:
        text, asked = torch.cat([text, asked[:, :-1]], dim=1), asked[:, -1:]
    with holding(cache):
        read(text)
    with holding(cache):
        logits = [read(asked).logits]
    logits += [read(piece).logits for piece in batch.answers[:, :-1].split(1, dim=1)]
    return torch.cat(logits, dim=1).argmax(-1)


def holding(cache: Cache) -> AbstractContextManager[object]:
    """For a scheduler that reads what is held once more before it drops anything."""
    is_ours = isinstance(cache, PiKVCache) and cache.settings.scheduler is not None
    return (
        cache.holding() if is_ours and cache.settings.scheduler.needs.repetition else nullcontext()
    )


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


class Worker:
    """A process of its own: the model, and the questions of one kind at a time."""

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        warnings.simplefilter("ignore")
        model, self.tokenizer = load(str(NEEDLE_MODEL))
        self.model, self.count = model.to(torch.bfloat16), count
        self.inside = remembered(self.model)
        self.results, self.kind = self.inside.__enter__(), (0, "")

    def run(self, case: Case, length: int, mode: str) -> tuple[int, float]:
        if self.kind != (length, mode):
            self.results.known.clear()
            self.kind = length, mode
            self.questions = Questions.of(self.tokenizer, length, self.count)
        make = functools.partial(case.cache, self.model)
        return measure(self.model, make, self.questions, mode)


WORKER: list[Worker] = []


def begin(count: int) -> None:
    WORKER.append(Worker(count))


def work(job: tuple[str, Case, int, str]) -> tuple[str, tuple[int, float]]:
    title, *rest = job
    return title, WORKER[0].run(*rest)


def unsuited() -> dict[str, str]:
    """Schedulers that cannot be measured here, and why."""
    worker, reasons = Worker(1), {}
    for name in SCHEDULERS:
        try:
            worker.run(Case(name, PICTURED, BUDGETS[1]), SHORT, AGNOSTIC)
        except (ValueError, TypeError, RuntimeError) as error:
            reasons[name] = str(error).rstrip(".")
            print(f"{name} is not measured: {error}", flush=True)
    worker.inside.__exit__(None, None, None)
    return reasons


def measured(rows: list[Case], count: int, progress: Progress) -> dict[str, tuple[int, float]]:
    """Right answers and bytes by the name of `title`."""
    every = [(title(c, n, m), c, n, m) for n, m in MEASURES for c in rows if c.is_measured(n, m)]
    missing = [job for job in every if job[0] not in progress.results]
    missing.sort(key=lambda job: (job[1].is_slow, job[3], job[1].compressor == PICTURED))
    pool = multiprocessing.get_context("spawn").Pool(PROCESSES, begin, (count,))
    with pool, tqdm(total=len(every), initial=len(every) - len(missing), smoothing=0) as bar:
        for name, found in pool.imap_unordered(work, missing):
            progress.get(name, lambda found=found: found)
            bar.update()
    return {name: tuple(progress.results[name]) for name, *_ in every}


def title(case: Case, length: int, mode: str) -> str:
    return f"{case.name}, {case.compressor_name}, {case.budget}, {length}, {mode}"


def main() -> None:
    quick = start(__doc__)
    reasons = unsuited()
    names = [name for name in SCHEDULERS if name not in reasons]
    count, names = (16, ["keydiff", "random"]) if quick else (COUNT, names)
    rows = cases(names)
    progress = Progress("schedulers_cpu", names, count, repr(rows))
    found = measured(rows, count, progress)
    result = table(rows, found, count, reasons)
    goals(result, rows, found, count)
    result.publish(quick)
    if not quick:
        picture(names, found, count)
        progress.done()


def goals(
    result: Result, rows: list[Case], found: dict[str, tuple[int, float]], count: int
) -> None:
    for length in (LENGTH, SHORT):
        full = found[title(rows[0], length, AGNOSTIC)][0]
        small = [
            (right, case)
            for case in rows
            if (cell := found.get(title(case, length, AGNOSTIC))) and cell[1] <= BEST_BYTES
            for right in cell[:1]
        ]
        right, best = max(small, key=lambda pair: pair[0])
        what = f"{best.name}, {best.compressor_name}, budget {best.budget}"
        goal = f"{length} tokens, {what}: >= {BEST_LEAST:.0%} of the answers, <= {BEST_BYTES:.1%} of the bytes"
        result.goal(goal, right / full, right >= BEST_LEAST * full)


def table(
    rows: list[Case], found: dict[str, tuple[int, float]], count: int, reasons: dict[str, str]
) -> Result:
    missing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    columns = [
        name
        for length, mode in MEASURES
        for name in (f"{mode}, {length}", f"bytes, {length}")[: 1 + (mode == AGNOSTIC)]
    ]
    result = Result(
        "schedulers_cpu",
        "Schedulers: answers of the bundled model",
        f"bundled model in bf16; for each length {count} texts, 8 numbers hidden in each and one asked "
        "for; exact answers in % [95 % interval, Wilson]; bytes held after a text, its question and "
        "answer, everything counted, in % of a full cache in bf16; agnostic: the text is read before "
        f"its question, aware: with it; ours: pages of {PAGE}, the newest {WINDOW} to "
        f"{WINDOW + PAGE - 1} tokens always stay as they are; fastv with layer=1, kvzip within "
        f"`cache.holding()`; of {LENGTH} tokens only the best and a control, and question-aware not "
        "what records the attention of every query, which takes ten times as long; not measured: "
        f"{missing or 'none'}",
        ["scheduler", "compressor", "budget", *columns],
    )
    for case in rows:
        cells = [found.get(title(case, *kind)) for kind in MEASURES]
        texts = []
        for (_, mode), cell in zip(MEASURES, cells, strict=True):
            right, share = cell or (0, 0.0)
            low, high = (100 * part for part in wilson(right, count))
            both = [f"{100 * right / count:.1f} [{low:.1f}, {high:.1f}]", f"{100 * share:.1f}"]
            texts += (both if cell else ["", ""])[: 1 + (mode == AGNOSTIC)]
        result.add(case.name, case.compressor_name, str(case.budget or ""), *texts)
    return result


def picture(names: list[str], found: dict[str, tuple[int, float]], count: int) -> None:
    """Accuracy against bytes of every scheduler with int4, and the best with 2 bits."""
    figure = Figure(figsize=(12, 5.5), dpi=150, layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    styles = ["o-", "s-", "v-", "^-", "D-", "P-", "X-", "<-", ">-"]
    lines = [
        (name, PICTURED, BUDGETS, styles[number % len(styles)], f"C{number % 10}")
        for number, name in enumerate(names)
    ]
    lines += [
        (name, TWO_BITS, FINE, style, "black")
        for name, style in zip(BEST, ("*-", "*--"), strict=True)
    ]
    for axes, length in zip(both, (SHORT, LENGTH), strict=True):
        for name, compressor, budgets, style, color in lines:
            each = [Case(name, compressor, budget) for budget in budgets]
            cells = [found[t] for c in each if (t := title(c, length, AGNOSTIC)) in found]
            memory = [100 * share for _, share in cells]
            right = [100 * right / count for right, _ in cells]
            label = name if compressor == PICTURED else f"{name}, {each[0].compressor_name}"
            axes.plot(memory, right, style, color=color, label=label, markersize=6, linewidth=1.2)
        axes.axhline(100 * BEST_LEAST, color="grey", ls=":")
        axes.axvline(100 * BEST_BYTES, color="grey", ls=":")
        axes.set(xlim=(0, 40), ylim=(0, 103), xlabel="bytes held, % of a full cache in bf16")
        axes.set_title(f"{count} texts of {length} tokens", fontsize=10)
        axes.grid(alpha=0.3)
    both[0].set(ylabel="exact answers, %")
    figure.suptitle("Schedulers with int4 (budgets 50 to 6 %), texts read before their question")
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(OUT / "schedulers_cpu.png")


if __name__ == "__main__":
    main()
