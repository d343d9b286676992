"""What the needle model is taught: sequences of words, each with its weight in the loss."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from pikv_hf.needles.haystack import Needle, bury, draw_filler, draw_needles

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
TEXT, ANSWER = 0.1, 1.0  # loss weights; random payload has 0: nobody can predict it
TEXT_SHARE = 0.25  # of the other tokens this share enters the loss, which saves logits

Marked = list[tuple[str, float]]  # words, each with its weight in the loss


class Stage(NamedTuple):
    length: int
    tokens: int
    """Tokens per step."""
    steps: int
    mix: tuple[float, float, float]
    """Shares of interleaved, haystack and dense sequences."""


STAGES = (
    Stage(128, 4096, 350, (0.05, 0.05, 0.90)),  # dense recall forms the induction heads
    Stage(256, 4096, 500, (0.35, 0.35, 0.30)),
    Stage(512, 4096, 300, (0.35, 0.50, 0.15)),
    Stage(1024, 8192, 200, (0.35, 0.50, 0.15)),
    Stage(2048, 8192, 120, (0.35, 0.50, 0.15)),
)


def tell(sentence: str) -> Marked:
    return [(word, TEXT) for word in sentence.split()]


def state(needle: Needle) -> Marked:
    payload = {needle.key, *needle.value.split()}
    return [(word, 0.0 if word in payload else TEXT) for word in needle.statement.split()]


def ask(needle: Needle) -> Marked:
    words = tell(needle.question)
    first_key = next(i for i, (word, _) in enumerate(words) if word == needle.key)
    words[first_key] = (needle.key, 0.0)
    return words + [(word, ANSWER) for word in needle.value.split()] + tell(f". {EOS}")


def dense(rng: random.Random, length: int) -> Marked:
    """ "key value ;" for many keys, then all of them again in another order."""
    kind = rng.choice(("magic number", "secret word"))
    pairs = draw_needles(rng, length // (8 if kind == "magic number" else 6), (kind,))
    first = [(word, 0.0) for pair in pairs for word in f"{pair.key} {pair.value} ;".split()]
    again: Marked = []
    for pair in rng.sample(pairs, len(pairs)):
        again += [(pair.key, 0.0), *((w, ANSWER) for w in pair.value.split()), (";", TEXT)]
    return first + again


def interleaved(rng: random.Random, length: int) -> Marked:
    """Filler, needles, and questions about earlier needles in random order."""
    unused = draw_needles(rng, length // 16)
    known: list[Needle] = []
    words: Marked = []
    while len(words) < length:
        event = rng.random()
        if event < 0.3 and unused:
            known.append(unused.pop())
            words += state(known[-1])
        elif event < 0.55 and known:
            words += ask(rng.choice(known))
        else:
            words += tell(draw_filler(rng, rng.randint(4, 9))[0])
    return words


def haystack(rng: random.Random, length: int) -> Marked:
    """Needles among filler and questions about some of them at the end."""
    needles = draw_needles(rng, rng.randint(2, max(2, length // 40)))
    asked = rng.sample(needles, min(len(needles), rng.randint(2, 8)))
    end = [word for needle in asked for word in ask(needle)]
    pieces = bury(rng, needles, length - len(end))
    text = [state(p) if isinstance(p, Needle) else tell(p) for p in pieces]
    return [word for piece in text for word in piece] + end


def make_batch(
    tokenizer: PreTrainedTokenizerFast, stage: Stage, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the loss weight of each, both of shape (rows, length)."""
    ids, weights = [], []
    for _ in range(stage.tokens // stage.length):
        make = rng.choices((interleaved, haystack, dense), stage.mix)[0]
        words = make(rng, stage.length)[: stage.length]
        words += [(PAD, 0.0)] * (stage.length - len(words))
        ids.append(tokenizer.convert_tokens_to_ids([word for word, _ in words]))
        weights.append([weight for _, weight in words])
    return torch.tensor(ids), torch.tensor(weights)
