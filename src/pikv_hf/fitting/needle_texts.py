"""Default texts of a profile: needles in a haystack, asked for at the end."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..needles.haystack import Haystack, make_haystack

NEEDLES = 4  # their questions and answers have about as many tokens as queries are measured
SEED = 5_000_000  # far from the seeds of the demo and the benchmarks


def needle_pieces(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, first: int = 0
) -> Iterator[Tensor]:
    """Yield the token ids [1, at most `length`] of texts `first` to `count` - 1."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    for seed in range(SEED + first, SEED + count):
        room, tokens = length, ids(_text_and_answers(length, seed, ids))
        while len(tokens) > length:
            room -= len(tokens) - length
            tokens = ids(_text_and_answers(room, seed, ids))
        yield torch.tensor([tokens])


def _text_and_answers(length: int, seed: int, ids: Callable[[str], list[int]]) -> str:
    """Return a text of about `length` tokens, followed by every question with its answer."""
    stack: Haystack = make_haystack(
        length=length, needles=NEEDLES, seed=seed, count=lambda text: len(ids(text))
    )
    pairs = zip(stack.questions, stack.answers, strict=True)
    return " ".join([stack.text, *(f"{question} {answer} ." for question, answer in pairs)])
