"""Texts to profile on, where none are given: needles in a haystack, asked for at the end."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..needles.haystack import Haystack, make_haystack

NEEDLES = 4  # whose questions and answers are about as long as the tokens that ask
SEED = 5_000_000  # other texts than those of the demo and of the benchmarks


def needle_pieces(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, first: int = 0
) -> Iterator[Tensor]:
    """`count` texts [1, at most `length`] of token ids, from number `first` on."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    for seed in range(SEED + first, SEED + count):
        room, tokens = length, ids(_asked(length, seed, ids))
        while len(tokens) > length:
            room -= len(tokens) - length
            tokens = ids(_asked(room, seed, ids))
        yield torch.tensor([tokens])


def _asked(length: int, seed: int, ids: Callable[[str], list[int]]) -> str:
    """A text of about `length` tokens, then every question with its answer."""
    stack: Haystack = make_haystack(
        length=length, needles=NEEDLES, seed=seed, count=lambda text: len(ids(text))
    )
    pairs = zip(stack.questions, stack.answers, strict=True)
    return " ".join([stack.text, *(f"{question} {answer} ." for question, answer in pairs)])
