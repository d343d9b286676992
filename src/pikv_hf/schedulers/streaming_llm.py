from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Candidates, Needs, Scheduler


@dataclass(frozen=True)
class StreamingLLM(Scheduler):
    """Keeps attention sinks and a recent window (Xiao et al., arXiv 2309.17453, section 3.2).

    The first `sinks` tokens of each row and the last `window` tokens are kept. Tokens are evicted
    in pages: between two evictions up to `page_size - 1` more are held.

    The paper counts positions within the cache: with `rerotate` the sinks move up to the recent
    tokens whenever a token between is evicted. Since keys of 16 bits would drift by rounding, one
    more byte is held for each dim that turns. Without `rerotate`, kept keys keep their RoPE phase.

    Args:
        sinks: first tokens kept, >= 0.
        window: recent tokens kept, > 0; not less than the cache's own `window`.
        rerotate: True if kept tokens close the gaps that evicted ones leave.
    """

    sinks: int = 4
    window: int = 1020
    rerotate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"`sinks` is {self.sinks!r}; it must be a whole number, 0 or more.")
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"`window` is {self.window!r}; it must be a whole number, 1 or more.")
        if not isinstance(self.rerotate, bool):
            raise TypeError(f"`rerotate` is {self.rerotate!r}; it must be True or False.")

    @property
    def needs(self) -> Needs:
        return Needs(inputs=frozenset({"rerotate"} if self.rerotate else ()), sinks=self.sinks)

    def budget(self, seen: int) -> int:
        return self.sinks + self.window

    def scores(self, tokens: Candidates) -> Tensor:
        recency = tokens.positions.to(torch.float64)
        is_sink = torch.arange(recency.shape[-1], device=recency.device) < self.sinks
        return recency.masked_fill(is_sink, torch.inf)
