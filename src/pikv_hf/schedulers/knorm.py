from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Candidates, Scheduler

# Candidates that are copied to float32 at a time, so that copies fit into the CPU's caches.
BLOCK = 1024


@dataclass(frozen=True)
class Knorm(Scheduler):
    """Keeps keys of small norm (Devoto et al., arXiv 2406.11430, section 3).

    In many language models a key of small L2 norm gets much attention. Not in all: in the bundled
    model keys of large norm get much attention.
    """

    def scores(self, tokens: Candidates) -> Tensor:
        norms, wide = [], None
        for block in tokens.keys.split(BLOCK, dim=2):
            if wide is None or wide.shape != block.shape:  # reused, as new memory costs more
                wide = torch.empty_like(block, dtype=torch.float32)
            norms.append(wide.copy_(block).norm(dim=-1))
        return -torch.cat(norms, dim=-1)
