from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_flag, check_whole
from .base import Candidates, Needs, Scheduler


@dataclass(frozen=True)
class StreamingLLM(Scheduler):
    """Keeps attention sinks and a recent window (Xiao et al., arXiv 2309.17453, section 3.2).

    The first `sinks` tokens of each row and the last `window` tokens are kept. Tokens are evicted
    in pages: between two evictions up to `page_size - 1` more are held.

    The paper counts positions within the cache: with `rerotate` the sinks move up to the recent
    tokens whenever tokens between them are evicted. Keys of 16 bits would drift by rounding, so one
    more byte is held for each rotated dim. Without `rerotate`, kept keys keep their positions.

    Args:
        sinks: first tokens kept, >= 0.
        window: recent tokens kept, > 0; not less than the cache's own `window`.
        rerotate: True if kept tokens close the gaps that evicted ones leave.
    """

    sinks: int = 4
    window: int = 1020
    rerotate: bool = False

    def __post_init__(self) -> None:
        check_whole("sinks", self.sinks)
        check_whole("window", self.window, 1)
        check_flag("rerotate", self.rerotate)

    @property
    def needs(self) -> Needs:
        return Needs(inputs=frozenset({"rerotate"} if self.rerotate else ()), sinks=self.sinks)

    def budget(self, seen: int) -> int:
        return self.sinks + self.window

    def scores(self, tokens: Candidates) -> Tensor:
        recency = tokens.positions.to(torch.float64)
        is_sink = torch.arange(recency.shape[-1], device=recency.device) < self.sinks
        return recency.masked_fill(is_sink, torch.inf)
