"""pikv_quest on the bundled model: what its texts, and keys with or without positions, are worth.

Answers: the text is read, and so evicted from, before its question. Attention: the share of it, of
the last 64 tokens of a text, that goes to the quarter of the tokens which each scheduler keeps. An
interrupted run is continued when it is started again.
"""

import functools
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from common import Result, start
from progress import Progress
from quality_cpu import Questions, wilson
from schedulers_cpu import AGNOSTIC, BUDGETS, LENGTH, PAGE, WINDOW, measure
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pikv_hf import SCHEDULERS, PiKVCache
from pikv_hf.attach.binding import binding_of
from pikv_hf.fitting.capture import QUERIES, Observer
from pikv_hf.fitting.resumable import write
from pikv_hf.fitting.utility_networks import fit_utility
from pikv_hf.model.artifact import ModelIdentity
from pikv_hf.model.loading import load
from pikv_hf.model.rotary import Rotary
from pikv_hf.needles.haystack import NEEDLE_MODEL, Haystack, make_haystack
from pikv_hf.schedulers import AdaKV, Candidates, PiKVQuest, Scheduler

CONTEXT, STEPS, WINDOWS, NEEDLES = 447, 500, 64, 8
ASKED = 118  # tokens of the questions and answers behind a text
LENGTHS = (200, CONTEXT, 1000)
TRAINING, HELD_OUT = 6_000_000, 7_000_000  # seeds
STAYS = Rotary(torch.empty(0))
OTHERS = ("keydiff", "knorm", "snapkv", "random")


@dataclass(frozen=True)
class AsCached(PiKVQuest):
    """Reads keys as they are cached."""

    def constants(self, tokens: Candidates) -> Tensor:
        return super().constants(replace(tokens, rotary=STAYS))


def asked(stack: Haystack) -> str:
    pairs = zip(stack.questions, stack.answers, strict=True)
    return " ".join([stack.text, *(f"{question} {answer} ." for question, answer in pairs)])


def observed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    seeds: range,
    questions: bool,
) -> Observer:
    """What attention reads in a text of each seed, with its questions behind it or without."""
    tokens = context + 1 + QUERIES
    observer = Observer(model, context, WINDOWS)
    for seed in seeds:
        room = tokens - ASKED if questions else tokens + 16
        stack = make_haystack(length=room, needles=NEEDLES, seed=seed)
        text = asked(stack) if questions else stack.text
        observer.read(tokenizer(text, return_tensors="pt").input_ids[:, -tokens:])
    observer.close()
    return observer


def fitted(observer: Observer, path: Path, turns: dict[int, Rotary]) -> Path:
    """A calibration as `pikv calibrate` makes it, of keys turned back by `turns`."""
    tensors = {}
    for idx, layer in observer.captured.layers.items():
        fit = fit_utility(layer, turns[idx], STEPS, idx, observer.model.device)
        tensors |= {f"pikv_quest.{idx}.{part}": tensor for part, tensor in fit.factors.items()}
    metadata = {"model": asdict(ModelIdentity.of(observer.model))}
    write(path, tensors, metadata | {"job": {"methods": ["pikv_quest"]}})
    return path


def attention_kept(observer: Observer, scheduler: Scheduler | None) -> float:
    """Of the attention to all tokens but the newest eighth, what a quarter of them keeps; None =
    those that get most."""
    shares = []
    for idx, layer in observer.captured.layers.items():
        rotary = binding_of(observer.model).rotaries[idx]
        for query, keys, values in (*layer.fitted, *layer.held_out):
            old = keys.shape[1] - keys.shape[1] // 8
            attention = (query @ keys.mT * layer.scale).softmax(-1).mean(1)[:, :old]
            tokens = Candidates(
                positions=torch.arange(old).expand(1, len(keys), -1),
                keys=keys[None, :, :old],
                values=values[None, :, :old],
                open_keys=keys[None, :, old:],
                open_values=values[None, :, old:],
                seen=keys.shape[1],
                layer_idx=idx,
                scale=layer.scale,
                rotary=rotary,
            )
            if scheduler is None:
                keep = attention.topk(old // 4).indices
            else:
                once = scheduler.needs.constants
                if once is not None:
                    tokens = replace(tokens, constants=once.constants(tokens))
                keep = scheduler.keep(tokens, old // 4)[0]
            shares.append((attention.gather(1, keep).sum(1) / attention.sum(1)).mean())
    return torch.stack(shares).mean().item()


def schedulers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: int, folder: Path
) -> dict[str, Scheduler]:
    turns = binding_of(model).rotaries
    seeds = range(TRAINING, TRAINING + texts)
    with_questions = observed(model, tokenizer, CONTEXT, seeds, True)
    free = PiKVQuest(fitted(with_questions, folder / "free", turns))
    cached = AsCached(fitted(with_questions, folder / "cached", dict.fromkeys(turns, STAYS)))
    alone = observed(model, tokenizer, CONTEXT, seeds, False)
    return {
        "pikv_quest": free,
        "pikv_quest inside of adakv": AdaKV(free),
        "pikv_quest, keys as they are cached": cached,
        "pikv_quest, texts without questions": PiKVQuest(fitted(alone, folder / "alone", turns)),
        **{name: SCHEDULERS[name]() for name in OTHERS},
    }


def main() -> None:
    quick = start(__doc__)
    count, texts, windows = (16, 8, 2) if quick else (200, 120, 24)
    model, tokenizer = load(str(NEEDLE_MODEL))
    low, high = (100 * share for share in wilson(count // 2, count))
    result = Result(
        "quest_cpu",
        "pikv_quest: attention foretold from keys and values",
        f"bundled model, answers in bf16; {count} texts of {LENGTH} tokens, {NEEDLES} numbers hidden "
        f"in each and one asked for; exact answers in % (an interval of 95 %, Wilson, is at most "
        f"{high - low:.0f} points wide) at a share of the tokens; attention in % that a quarter of the "
        f"tokens keeps, of {windows} texts of each length with questions behind them, the mean over "
        f"layers, KV heads and texts (not of schedulers that decide by queries, or by more than "
        f"scores); calibrated on {texts} other texts of {CONTEXT} tokens and {QUERIES} that ask; pages "
        f"of {PAGE}, window {WINDOW}",
        ["scheduler", *(f"{b:.4g}" for b in BUDGETS), *(f"attention, {n} tokens" for n in LENGTHS)],
    )
    progress = Progress("quest_cpu", count, texts, windows)
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = schedulers(model, tokenizer, texts, Path(folder))
        seeds = range(HELD_OUT, HELD_OUT + windows)
        texts_of = {n: observed(model, tokenizer, n, seeds, True) for n in LENGTHS}
        best = [f"{100 * attention_kept(texts_of[n], None):.1f}" for n in LENGTHS]
        masses = {
            name: [f"{100 * attention_kept(texts_of[n], scheduler):.1f}" for n in LENGTHS]
            for name, scheduler in made.items()
            if not (scheduler.traits.is_ragged or scheduler.needs.queries)
        }
        questions = Questions.of(tokenizer, LENGTH, count)
        model = model.to(torch.bfloat16)
        for name, scheduler in tqdm(made.items()):
            options = {"page_size": PAGE, "window": WINDOW, "scheduler": scheduler}
            rows[name] = []
            for budget in BUDGETS:
                make = functools.partial(PiKVCache, model, budget=budget, **options)
                run = functools.partial(measure, model, make, questions, AGNOSTIC)
                rows[name].append(100 * progress.get(f"{name}, {budget}", run)[0] / count)
    for name, row in rows.items():
        result.add(name, *(f"{n:.1f}" for n in row), *masses.get(name, [""] * len(LENGTHS)))
    result.add("the tokens that get most", *[""] * len(BUDGETS), *best)
    quarter = BUDGETS.index(0.25)
    for other in ("keydiff", "random"):
        gained = rows["pikv_quest"][quarter] - rows[other][quarter]
        result.goal(f"answers at a quarter, more than {other}, points", gained, gained > 0)
    result.publish(quick)
    progress.done()


if __name__ == "__main__":
    main()
