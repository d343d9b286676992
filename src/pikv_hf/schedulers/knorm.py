from dataclasses import dataclass

from torch import Tensor

from .base import Scheduler, Tokens


@dataclass(frozen=True)
class Knorm(Scheduler):
    """Keys of small norm stay (Devoto et al., arXiv 2406.11430, section 3).

    In many language models a key of small L2 norm gets much attention. That is a property of the
    model, not of attention: in the bundled one it is the other way round.
    """

    def scores(self, tokens: Tokens) -> Tensor:
        return -tokens.keys.float().norm(dim=-1)
