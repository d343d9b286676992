from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Candidates, Needs, Scheduler


@dataclass(frozen=True)
class KVzip(Scheduler):
    """What the model needs to repeat the text stays (Kim et al., arXiv 2505.23416, section 3).

    A document is read within `with cache.holding():`, or a prompt with `hold_prompt=True`. Before
    anything of it is dropped, the model reads it a second time behind itself, in chunks, and takes
    the repetition back. The score of a token is the largest attention that it gets from any query
    of its chunk's repetition and any query head of its KV head, beside the chunk, the repetition
    itself and the sinks. So it does not depend on a question. That costs about what reading the
    document did.

    Questions and answers behind it are not repeated. They stay before all other tokens, and of them
    the newest, until a second text is held: then those that are still open are repeated with it.
    In the paper heads and layers share one budget; `AdaKV(KVzip(), alpha=0)` shares each layer's.

    Args:
        prompt_ids: tokens that ask the model to repeat the text, in front of each chunk.
        chunk_size: tokens that are repeated at a time.
        overlap: last tokens of the chunk before, in front of each but the first.
        sinks: first tokens of each row that the softmax has beside each chunk.
    """

    prompt_ids: tuple[int, ...] = ()
    chunk_size: int = 2048
    overlap: int = 8
    sinks: int = 4

    def __post_init__(self) -> None:
        ids = self.prompt_ids
        if not isinstance(ids, tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"`prompt_ids` is {ids!r}; it must be a tuple of token ids.")
        for name, least in (("chunk_size", 1), ("overlap", 0), ("sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"`{name}` is {value!r}; it must be a whole number, {least} or more."
                )

    @property
    def needs(self) -> Needs:
        return Needs(repetition=self)

    def scores(self, tokens: Candidates) -> Tensor:
        assert tokens.statistics is not None, "the cache keeps what a repetition marks"
        marks = tokens.statistics[..., 0]
        return marks.masked_fill(marks == 0, torch.inf)
