from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Candidates, Needs, Scheduler


@dataclass(frozen=True)
class StreamingLLM(Scheduler):
    """Attention sinks and a recent window (Xiao et al., arXiv 2309.17453, section 3.2).

    Keeps the first `sinks` tokens of each row and the last `window` tokens. Candidates leave in pages:
    between two evictions up to `page_size - 1` more are held.

    As published, positions are those in the cache: with `rerotate` the sinks move up to the recent
    tokens whenever something between is dropped. Their keys would drift by rounding: in 16 bits one
    byte more is held of each dim that turns. Without, kept keys keep their RoPE phase.

    Args:
        sinks: first tokens kept, >= 0.
        window: recent tokens kept, > 0; not less than the cache's own `window`, which never leaves.
        rerotate: whether kept tokens close the gaps that dropped ones leave.
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
