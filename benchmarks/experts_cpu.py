"""Does what the model's gate says of tokens help to choose those that stay? On the bundled model.

Each term of the scheduler `expert` alone and beside two other scorers, in both directions; as the
control, the same with the labels of the candidates exchanged at random. Questions as in
schedulers_cpu.py: read after the text (agnostic), or with it (aware) where the scorer asks queries. An
interrupted run is continued when it is started again.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import Result, start
from progress import Progress
from quality_cpu import Questions, wilson
from schedulers_cpu import AGNOSTIC, AWARE, FULL, LENGTH, PAGE, WINDOW, ask, measure
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from pikv_hf import PiKVCache
from pikv_hf.model.loading import load
from pikv_hf.needles.haystack import NEEDLE_MODEL
from pikv_hf.schedulers import Candidates, Expert, KeyDiff, Random, Scheduler, SnapKV
from pikv_hf.schedulers.expert import TERMS

BUDGETS = (0.25, 0.125)
# The gates' two weights add up to 1: by confidence tokens stand in the reverse order of spread.
TESTED = ("spread", "popularity", "agreement")
WEIGHT = 0.25  # of a term, that of the scorer being 1
OFF = dict.fromkeys(TERMS, 0.0)
FURTHER = 600
# Of each scorer the best row, and the budget: asked again with further questions.
CLAIMS = (("keydiff", "agreement", 0.125), ("snapkv", "agreement", 0.25))


@dataclass(frozen=True)
class Shuffled(Expert):
    """The control: every candidate has the labels of another."""

    def scores(self, tokens: Candidates) -> Tensor:
        if tokens.experts is not None and tokens.weights is not None:
            generator = torch.Generator().manual_seed(tokens.layer_idx)
            order = torch.randperm(tokens.experts.shape[2], generator=generator)
            labels = {n: getattr(tokens, n)[:, :, order] for n in ("experts", "weights")}
            tokens = replace(tokens, **labels)
        return super().scores(tokens)


def title(scorer: str, term: str, weight: float, control: bool = False) -> str:
    name = f"{scorer} {'+' if weight > 0 else '-'} {abs(weight):g} {term}"
    return name + (", labels exchanged" if control else "")


def cases(scorers: dict[str, Scheduler], terms: tuple[str, ...]) -> dict[str, Scheduler]:
    out: dict[str, Scheduler] = {"random": Random()}
    for term in terms:
        for sign in (1.0, -1.0):
            alone = Expert(weight=0.0, **(OFF | {term: sign}))
            out[title("no scorer", term, sign)] = alone
    for name, scorer in scorers.items():
        out[name] = scorer
        for term in terms:
            for weight in (WEIGHT, -WEIGHT):
                out[title(name, term, weight)] = Expert(scorer, **(OFF | {term: weight}))
            control = Shuffled(scorer, **(OFF | {term: -WEIGHT}))
            out[title(name, term, -WEIGHT, control=True)] = control
    return out


def answered(
    model: PreTrainedModel, make: Callable[[], Cache], questions: Questions, mode: str
) -> list[bool]:
    """Which questions are answered exactly."""
    right: list[bool] = []
    for batch in questions.batches():
        right += (ask(model, make(), batch, mode) == batch.answers).all(-1).tolist()
    return right


def sign_test(wins: int, losses: int) -> float:
    """How probable a difference as large is, in either direction, where there is none."""
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1)) / 2**total
    return min(2 * tail, 1.0)


def mode_of(scheduler: Scheduler) -> str:
    """Queries are worth asking when they are those of the question."""
    asks = scheduler.needs.queries and getattr(scheduler, "weight", 1)
    return AWARE if asks else AGNOSTIC


def main() -> None:
    quick = start(__doc__)
    count, further = (16, 16) if quick else (200, FURTHER)
    scorers: dict[str, Scheduler] = {"keydiff": KeyDiff()}
    if not quick:
        scorers["snapkv"] = SnapKV()
    model, tokenizer = load(str(NEEDLE_MODEL))
    model = model.to(torch.bfloat16)
    every = Questions.of(tokenizer, LENGTH, count + further)
    questions, others = (
        Questions(*(t[part] for t in vars(every).values()))
        for part in (slice(count), slice(count, None))
    )
    todo = cases(scorers, TESTED[-1:] if quick else TESTED)
    progress = Progress("experts_cpu", list(todo), count)
    found: dict[str, list[int]] = {}

    def maker(name: str, budget: float) -> Callable[[], Cache]:
        options = {"scheduler": todo[name], "page_size": PAGE, "window": WINDOW}
        return functools.partial(PiKVCache, model, budget=budget, **options)

    def count_right(name: str) -> list[int]:
        mode = mode_of(todo[name])
        return [measure(model, maker(name, budget), questions, mode)[0] for budget in BUDGETS]

    full = progress.get(FULL, lambda: measure(model, DynamicCache, questions, AGNOSTIC)[0])
    for name in tqdm(todo):
        found[name] = progress.get(name, functools.partial(count_right, name))
    low, high = (100 * share for share in wilson(count // 2, count))
    result = Result(
        "experts_cpu",
        "Expert labels as scores: answers of the bundled model",
        f"bundled model in bf16; {count} texts of {LENGTH} tokens, 8 numbers hidden in each and one "
        f"asked for; exact answers in % (an interval of 95 %, Wilson, is at most {high - low:.0f} "
        "points wide); the ranks of the scorer count 1, those of the term as much as its row says; "
        f"pages of {PAGE}, the newest {WINDOW} to {WINDOW + PAGE - 1} tokens always stay",
        ["tokens stay by", "question", *(f"{budget:.4g}" for budget in BUDGETS)],
    )
    result.add(FULL, "", f"{100 * full / count:.1f}", "")
    for name, right in found.items():
        result.add(name, mode_of(todo[name]), *(f"{100 * cell / count:.1f}" for cell in right))
    for scorer, term, budget in CLAIMS[: len(scorers)]:
        name = title(scorer, term, -WEIGHT)
        mode = mode_of(todo[name])
        pair = [
            progress.get(
                f"{case}, {budget}, further",
                functools.partial(answered, model, maker(case, budget), others, mode),
            )
            for case in (name, scorer)
        ]
        wins = sum(a and not b for a, b in zip(*pair, strict=True))
        losses = sum(b and not a for a, b in zip(*pair, strict=True))
        shares = [f"{100 * sum(right) / further:.1f}" for right in pair]
        text = (
            f"{name}, budget {budget:.4g}, {further} further questions: {shares[0]} % instead of the "
            f"{shares[1]} % of {scorer}; {wins} won, {losses} lost, p < .05 in a sign test"
        )
        chance = sign_test(wins, losses)
        result.goal(text, chance, wins > losses and chance < 0.05)
    result.publish(quick)
    progress.done()


if __name__ == "__main__":
    main()
