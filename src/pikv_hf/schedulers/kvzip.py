from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_whole
from .base import Candidates, Needs, Scheduler


@dataclass(frozen=True)
class KVzip(Scheduler):
    """Keeps tokens that help to repeat the text (Kim et al., arXiv 2505.23416, section 3).

    A document is read within `with cache.holding():`, or a prompt with `hold_prompt=True`. Before
    its tokens are evicted, the model reads the text again after itself, in chunks that are then
    removed. The score of a token is the largest attention that it gets from any query of
    its chunk's repetition and any query head of its KV head; the softmax is over the chunk, its
    repetition and the sinks. Scores do not depend on a question, and cost about one more prefill.

    Questions and answers after the text are not repeated. They are kept before all other tokens,
    the newest first. A second text that is held is repeated with any of them still in the tail.
    In the paper heads and layers share one budget; `AdaKV(KVzip(), alpha=0)` shares each layer's.

    Args:
        prompt_ids: tokens in front of each chunk that ask the model to repeat the text.
        chunk_size: tokens that are repeated at a time.
        overlap: last tokens of the previous chunk, in front of each chunk but the first.
        sinks: first tokens of each row that the softmax includes beside each chunk.
    """

    prompt_ids: tuple[int, ...] = ()
    chunk_size: int = 2048
    overlap: int = 8
    sinks: int = 4

    def __post_init__(self) -> None:
        ids = self.prompt_ids
        if not isinstance(ids, tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"`prompt_ids` is {ids!r}; it must be a tuple of token ids.")
        for name, minimum in (("chunk_size", 1), ("overlap", 0), ("sinks", 0)):
            check_whole(name, getattr(self, name), minimum)

    @property
    def needs(self) -> Needs:
        return Needs(repetition=self)

    def scores(self, tokens: Candidates) -> Tensor:
        assert tokens.statistics is not None, "a repetition has marked the tokens"
        marks = tokens.statistics[..., 0]
        return marks.masked_fill(marks == 0, torch.inf)
