"""What each router costs in answers of the bundled model, and how much of the attention it reads.

A text is read as a prompt, which reads all pages. Then its question and answer are read token by
token: each token reads only what the router selects, also the last one of the question, which
decides the answer. Every router of the registry enters by itself. An interrupted run is continued
when it is started again. With --model, --text or --length only the attention is measured, of that
model on that text, and nothing is written.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from attention_read import Heard, Imagined, Labels, Mass, Watch, agreement
from common import Result, arguments
from experts_cpu import sign_test
from progress import Progress
from quality_cpu import FULL, Questions, wilson
from remembered import remembered
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from pikv_hf import ROUTERS, PiKVCache
from pikv_hf.model.loading import check_length, encode, load
from pikv_hf.model.versions import with_cache
from pikv_hf.needles.haystack import NEEDLE_MODEL, make_haystack
from pikv_hf.routers import (
    Adaptive,
    Clusters,
    Oracle,
    PageRouter,
    PiKVRouter,
    Quest,
    RandomPages,
    TopK,
)

PAGE, LARGE_PAGE, WINDOW = 16, 64, 32
LENGTH, COUNT, ASKED = 1024, 256, 32
SHARES = (0.5, 0.25, 0.125, 0.0625)
TARGETS = (0.95, 0.8, 0.5, 0.25)  # of adaptive, which decides itself how many pages it reads
LEFT_OUT = {"all": "reads all pages", "cache_aware": "equals topk where the device holds all pages"}
GOALS = ((0.25, 1.0), (0.125, 3.0))  # share of pages, points of answers that may be lost
HALF, HALVING = "keydiff keeps half", {"scheduler": "keydiff", "budget": 0.5}
LABELS = "labels exchanged"
EARLY = "topk, experts_from early_gate"
# Experts of pages differ little: their agreement moves a choice by bounds only if it is multiplied.
STRENGTHS = (4, 16)
STRONGER = "pikv, agreement=16"
# Do labels help beside bounds? Asked where quest may lose answers.
BESIDE = (("", 0.0625), (f", pages of {LARGE_PAGE}", 0.25), (f", pages of {LARGE_PAGE}", 0.125))


class Exchanged:
    """Mixed into a rule as its control: every token has the labels of another."""

    def digest(
        self, keys: Tensor, known: dict[str, Tensor], num_experts: int | None
    ) -> dict[str, Tensor]:
        count = keys.shape[2] * keys.shape[3]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        mixed = {
            name: t.flatten(2, 3)[:, :, order].view(t.shape)
            for name, t in known.items()
            if name in ("experts", "weights")
        }
        digests = super().digest(keys, known | mixed, num_experts)  # ty: ignore[unresolved-attribute]
        return {"mixed" if name == "shares" else name: t for name, t in digests.items()}

    def prepared(self, digests: dict[str, Tensor], is_full: Tensor) -> dict[str, Tensor]:
        named = digests | ({"shares": digests["mixed"]} if "mixed" in digests else {})
        return super().prepared(named, is_full)  # ty: ignore[unresolved-attribute]


@dataclass(frozen=True)
class ExchangedTopK(Exchanged, TopK):
    """The control of topk."""


@dataclass(frozen=True)
class ExchangedPiKV(Exchanged, PiKVRouter):
    """The control of pikv."""


@dataclass(frozen=True)
class Row:
    """One rule in the table: a router for each share of the pages, and what else the cache has."""

    router: Callable[[float], PageRouter]
    page: int = PAGE
    options: dict[str, Any] = field(default_factory=dict)

    def cache(self, model: PreTrainedModel, share: float) -> PiKVCache:
        sizes = {"page_size": self.page, "window": WINDOW}
        return PiKVCache(model, router=self.router(share), **sizes, **self.options)


def of_share(made: type[PageRouter], **options: Any) -> Callable[[float], PageRouter]:
    return lambda share: made(fraction=share, **options)


def adaptive(share: float) -> PageRouter:
    return Adaptive(target=TARGETS[SHARES.index(share)])


def all_rows() -> dict[str, Row]:
    rows = {
        name: Row(adaptive if made is Adaptive else of_share(made))
        for name, made in ROUTERS.items()
        if name not in LEFT_OUT and issubclass(made, PageRouter)
    }
    rows |= {
        "topk, experts_from previous_token": Row(of_share(TopK, experts_from="previous_token")),
        EARLY: Row(of_share(TopK, experts_from="early_gate")),
        f"topk, {LABELS}": Row(of_share(ExchangedTopK)),
        **{f"pikv, agreement={n}": Row(of_share(PiKVRouter, agreement=n)) for n in STRENGTHS},
        f"{STRONGER}, {LABELS}": Row(of_share(ExchangedPiKV, agreement=16)),
        "quest, int4": Row(of_share(Quest), options={"compressor": "int4"}),
        f"quest, {HALF}": Row(of_share(Quest), options=HALVING),
    }
    for name in ("random", "quest", "topk", "pikv, agreement=4", STRONGER, "clusters", "oracle"):
        rows[f"{name}, pages of {LARGE_PAGE}"] = Row(rows[name].router, LARGE_PAGE)
    return rows


UNLIKE = "previous_layer, pages by their own gate"
BOTH_EARLY = "early gate, pages too"


def imagined() -> dict[str, tuple[Imagined, str]]:
    """Rows that no cache can have yet, and from where each takes the experts of queries and pages."""
    found = {
        f"topk, experts from {source}": (Imagined(TopK()), source)
        for source in (UNLIKE, "translated", BOTH_EARLY, "hindsight")
    }
    rules = {"random": RandomPages(), "quest": Quest(), "clusters": Clusters(), "oracle": Oracle()}
    for group in ("expert", "nothing"):
        for name, router in rules.items():
            found[f"{name}, pages by {group}"] = Imagined(router, group), "previous_layer"
        for source in ("previous_layer", "previous_token", "hindsight"):
            name = f"topk, experts from {source}, pages by {group}"
            found[name] = Imagined(TopK(), group), source
    return found


# ---- one batch ----------------------------------------------------------------------------------


def ask(model: PreTrainedModel, cache: Cache, batch: Questions) -> Tensor:
    """The tokens [n, A] that the model answers, the right one before each given.

    An answer is right in all its tokens where greedy decoding, which goes on with its own tokens,
    would give it.
    """
    read = functools.partial(model, **with_cache(cache), logits_to_keep=1)
    read(batch.texts)
    tokens = torch.cat([batch.questions, batch.answers[:, :-1]], dim=1)
    logits = [read(token).logits for token in tokens.split(1, dim=1)]
    return torch.cat(logits[-batch.answers.shape[1] :], dim=1).argmax(-1)


def right(model: PreTrainedModel, cache: Cache, batch: Questions) -> list[bool]:
    found = (ask(model, cache, batch) == batch.answers).all(-1).tolist()
    if isinstance(cache, PiKVCache):
        cache.detach()
    return found


def title(name: str, share: float) -> str:
    return f"{name}, {share}"


def measure(model: PreTrainedModel, batch: Questions, rows: dict[str, Row]) -> dict[str, Any]:
    """Which answers are right, the masses, and how well experts are foretold: ready for JSON."""
    sizes = {"page_size": PAGE, "window": WINDOW}
    answers = {
        FULL: right(model, DynamicCache(), batch),
        HALF: right(model, PiKVCache(model, **HALVING, **sizes), batch),
    }
    for name, row in rows.items():
        for share in SHARES:
            answers[title(name, share)] = right(model, row.cache(model, share), batch)
    masses: dict[str, Mass] = {}
    foretold: dict[str, dict[str, float]] = {}
    for page, routers in watches(rows):
        watch, heard = watched(model, batch, routers, page)
        masses |= watch.masses
        if not foretold and page == PAGE:
            more, foretold = imagine(watch, heard, batch.texts.shape[1])
            masses |= more
    return {
        "right": answers,
        "masses": {name: asdict(mass) for name, mass in masses.items()},
        "foretold": foretold,
    }


def watches(rows: dict[str, Row]) -> list[tuple[int, dict[str, PageRouter]]]:
    """The routers of rows that can share a cache, for each share of the pages, and its page size."""
    together: dict[tuple[int, str], dict[str, PageRouter]] = {}
    for name, row in rows.items():
        for share in SHARES if not row.options else ():
            router = row.router(share)
            together.setdefault((row.page, router.source), {})[title(name, share)] = router
    return [(page, routers) for (page, _), routers in together.items()]


def watched(
    model: PreTrainedModel, batch: Questions, routers: dict[str, PageRouter], page: int
) -> tuple[Watch, Heard]:
    """What the rules would read, and what the gates choose, while all pages are read."""
    watch, heard = Watch(routers), Heard(model, len(batch.texts))
    with watch.cache(model, page, WINDOW) as cache, watch.watching():
        ask(model, cache, batch)
    heard.close()
    return watch, heard


def imagine(
    watch: Watch, heard: Heard, text: int
) -> tuple[dict[str, Mass], dict[str, dict[str, float]]]:
    """The masses of `imagined`, and by layer the weight of the experts that each source foretells."""
    masses: dict[str, Mass] = {}
    foretold: dict[str, dict[str, float]] = {}
    for layer, asked in watch.layers.items():
        own, before = heard.own[layer], heard.own.get(layer - 1)
        known = heard.foretelling(layer, text)
        for name, labels in known.items():
            weight = agreement(labels, own, heard.count)[:, text:].mean()
            foretold.setdefault(name, {})[str(layer)] = float(weight)
        sources: dict[str, tuple[Labels, Labels]] = {
            n: (own, labels) for n, labels in known.items()
        }
        sources[UNLIKE] = sources["previous_layer"]
        if before is not None:
            sources["previous_layer"] = before, before
        sources[BOTH_EARLY] = heard.early[layer], heard.early[layer]
        for name, (rule, source) in imagined().items():
            totals = {share: masses.setdefault(title(name, share), Mass()) for share in SHARES}
            rule.measure(asked, layer, *sources[source], PAGE, heard.count, totals)
    return masses, foretold


# ---- the table ----------------------------------------------------------------------------------


@dataclass
class Found:
    """The sums over all batches."""

    right: dict[str, list[bool]]
    masses: dict[str, Mass]
    foretold: dict[str, dict[str, float]]

    @classmethod
    def of(cls, batches: list[dict[str, Any]]) -> "Found":
        first = batches[0]
        masses = {name: Mass() for name in first["masses"]}
        for batch in batches:
            for name, mass in batch["masses"].items():
                masses[name] = masses[name].plus(Mass(**mass))
        return cls(
            right={n: [x for b in batches for x in b["right"][n]] for n in first["right"]},
            masses=masses,
            foretold={
                name: {
                    idx: sum(b["foretold"][name][idx] for b in batches) / len(batches)
                    for idx in first["foretold"][name]
                }
                for name in first["foretold"]
            },
        )

    def percent(self, name: str) -> float:
        return 100 * sum(self.right[name]) / len(self.right[name])

    def answers(self, name: str) -> str:
        if name not in self.right:
            return ""
        low, high = wilson(sum(self.right[name]), len(self.right[name]))
        return f"{self.percent(name):.1f} [{100 * low:.0f}, {100 * high:.0f}]"

    def attention(self, name: str) -> str:
        return shown(self.masses[name]) if name in self.masses else ""

    def row(self, name: str) -> list[str]:
        names = [title(name, share) for share in SHARES]
        cells = [*map(self.answers, names), *map(self.attention, names)]
        if name == "adaptive":
            read = [100 * self.masses[n].share_of_tokens for n in names]
            cells = [
                f"{cell}, {share:.0f} % read" for cell, share in zip(cells, read * 2, strict=True)
            ]
        return cells


def shown(mass: Mass) -> str:
    return f"{100 * mass.share:.1f} ({100 * mass.share_of_pages:.1f})"


def columns() -> list[str]:
    shares = [f"{100 * share:.4g} %" for share in SHARES]
    return ["rule", *(f"exact, {s}" for s in shares), *(f"attention, {s}" for s in shares)]


def table(found: Found, rows: dict[str, Row], count: int) -> Result:
    result = Result(
        "routers_cpu", "Routers: answers of the bundled model", setting(found, count), columns()
    )
    for name in (FULL, HALF):
        result.add(name, found.answers(name), *[""] * (len(result.columns) - 2))
    for name in (*rows, *imagined()):
        result.add(name, *found.row(name))
    return result


def setting(found: Found, count: int) -> str:
    left_out = "; ".join(f"{name} {why}" for name, why in LEFT_OUT.items())
    foretold = "; ".join(
        f"{name} {' and '.join(f'{100 * share:.0f}' for share in by_layer.values())}"
        for name, by_layer in found.foretold.items()
        if name != "hindsight"
    )
    return (
        f"bundled model; {count} texts of {LENGTH} tokens, 8 numbers hidden in each and one asked for; "
        "the text is read as a prompt, then question and answer token by token by the rule; columns: "
        f"share of the pages that a KV head reads; pages of {PAGE}, of the newest tokens {WINDOW} to "
        f"{WINDOW + PAGE - 1} are in no page and always read; exact: % of answers [95 % interval, "
        "Wilson]; attention: % of it that falls on what is read, and in brackets of that on pages "
        "alone, by the queries of a cache that reads all, mean over question and answer tokens, "
        "heads and layers; adaptive: targets "
        f"{', '.join(map(str, TARGETS))} and the pages it reads; pages of the first tokens count and "
        "are always read, so that 6.25 % of pages of "
        f"{LARGE_PAGE} are these alone; {LABELS}: the control, where each token has the labels of "
        f"another; {HALF}: the shares are of these; rows without answers are computed from recorded "
        "queries and keys; previous_layer: queries and pages by the gate of the layer before (layer "
        "0: by its own and the previous token); translated: by how often experts of both gates go "
        "together in the text; early gate: the gate applied before attention; hindsight: the experts "
        "that the gate then chooses; pages too: pages by the same, else by their own gate; pages by "
        "expert: tokens ordered by the expert with the largest weight, by nothing: at random; left "
        f"out: {left_out}; weight of the chosen experts that were foretold, in % of layer 0 and 1 "
        f"(25 by chance): {foretold}"
    )


def goals(result: Result, found: Found, rows: dict[str, Row]) -> None:
    rules = [
        name
        for name, row in rows.items()
        if name in ROUTERS and name not in ("oracle", "adaptive") and row.page == PAGE
    ]
    for share, points in GOALS:
        best = max(rules, key=lambda name: found.percent(title(name, share)))
        lost = found.percent(FULL) - found.percent(title(best, share))
        text = f"{100 * share:.4g} % of the pages, {best}: <= {points:g} points of answers lost"
        result.goal(text, lost, lost <= points)
    for pages, share in BESIDE if STRONGER in rows else ():
        pair = [found.right[title(rule + pages, share)] for rule in (STRONGER, "quest")]
        wins = sum(a and not b for a, b in zip(*pair, strict=True))
        losses = sum(b and not a for a, b in zip(*pair, strict=True))
        chance = sign_test(wins, losses)
        text = (
            f"labels beside bounds, {100 * share:.4g} % of the pages{pages}: {STRONGER} wins {wins} "
            f"answers that quest loses, and loses {losses}, p < .05 in a sign test"
        )
        result.goal(text, chance, wins > losses and chance < 0.05)


# ---- any model and text -------------------------------------------------------------------------


def on_text(name: str, text: str | None, length: int) -> None:
    """Print the attention of the last tokens of a text of `length` tokens that each rule reads."""
    model, tokenizer = load(name)
    check_length(model, length, f"--length is {length}")
    if text is None:
        text = make_haystack(
            length=length, needles=8, count=lambda words: len(tokenizer(words).input_ids)
        ).prompt()
    ids = encode(model, tokenizer, text)["input_ids"][:, :length]
    if ids.shape[1] < 2 * (ASKED + WINDOW + PAGE):
        raise SystemExit(f"the text has {ids.shape[1]} tokens: too few to be read in pages.")
    masses: dict[str, Mass] = {}
    for page, routers in watches({n: row for n, row in all_rows().items() if row.page == PAGE}):
        watch = Watch(routers)
        with watch.cache(model, page, WINDOW) as cache, watch.watching():
            read = functools.partial(model, **with_cache(cache), logits_to_keep=1)
            read(ids[:, :-ASKED])
            for token in tqdm(ids[:, -ASKED:].split(1, dim=1)):
                read(token)
        masses |= watch.masses
    result = Result(
        "routers_cpu",
        f"Routers: attention read, {name}",
        f"% of the attention of the last {ASKED} of {ids.shape[1]} tokens that falls on what is "
        "read, and in brackets of that on pages alone, mean over tokens, heads and paged layers; "
        f"pages of {PAGE}, window {WINDOW}; adaptive reads as many pages as it needs",
        ["rule", *(f"{100 * share:.4g} %" for share in SHARES)],
    )
    for rule in all_rows():
        cells = [shown(masses[name]) for s in SHARES if (name := title(rule, s)) in masses]
        if cells:
            result.add(rule, *cells)
    result.publish(quick=True)


def main() -> None:
    given = arguments(
        __doc__ or "",
        model={"help": "a checkpoint; the bundled model by default"},
        text={"type": Path, "help": "a file to read; by default numbers hidden in sentences"},
        length={"type": int, "help": f"tokens of the text that are read; {LENGTH} by default"},
    )
    if given.model or given.text or given.length:
        text = given.text.read_text() if given.text else None
        return on_text(given.model or str(NEEDLE_MODEL), text, given.length or LENGTH)
    count, rows = (
        (16, {n: all_rows()[n] for n in ("quest", "pikv", "random", EARLY)})
        if given.quick
        else (COUNT, all_rows())
    )
    model, tokenizer = load(str(NEEDLE_MODEL))
    batches = Questions.of(tokenizer, LENGTH, count).batches()
    progress = Progress("routers_cpu", list(rows), count)
    done = []
    with remembered(model) as results:
        for number, batch in enumerate(tqdm(batches)):
            run = functools.partial(measure, model, batch, rows)
            done.append(progress.get(str(number), run))
            results.known.clear()
    found = Found.of(done)
    result = table(found, rows, count)
    goals(result, found, rows)
    result.publish(given.quick)
    progress.done()


if __name__ == "__main__":
    main()
