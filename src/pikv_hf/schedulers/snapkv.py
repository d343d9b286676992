from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..validation import check_count
from .attention_mass import attention_mass
from .base import Candidates, Needs, Scheduler


@dataclass(frozen=True)
class SnapKV(Scheduler):
    """Keeps tokens that the newest tokens attend to (Li et al., arXiv 2404.14469, section 4).

    The score is the mean attention of the newest tokens, smoothed over `kernel_size` neighbours so
    that a token is kept with its surroundings, and averaged over the query heads of a KV head. The
    paper compresses a prompt once; here scores are computed anew whenever tokens are sealed, from
    the queries that are then the newest.

    Args:
        window_size: newest tokens whose queries count; the cache's `window` should not be shorter.
        kernel_size: neighbouring tokens whose attention is averaged, odd.
    """

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        check_count("window_size", self.window_size)
        size = self.kernel_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size % 2 == 0:
            raise ValueError(f"`kernel_size` is {size!r}; it must be an odd positive number.")

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window_size)

    def scores(self, tokens: Candidates) -> Tensor:
        mass = attention_mass(tokens).mean(dim=2)
        return F.avg_pool1d(mass, self.kernel_size, stride=1, padding=self.kernel_size // 2)
