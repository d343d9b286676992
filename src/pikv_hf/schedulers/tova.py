from dataclasses import dataclass

from torch import Tensor

from .attention_mass import attention_mass
from .base import Scheduler, Tokens


@dataclass(frozen=True)
class Tova(Scheduler):
    """What the newest token attends to stays (TOVA, Oren et al., arXiv 2401.06104, section 3.2).

    The score is the attention of the newest token, averaged over all heads of the layer, so that
    every KV head keeps the same tokens.
    """

    @property
    def observed_queries(self) -> int:
        return 1

    @property
    def is_per_head(self) -> bool:
        return False

    def scores(self, tokens: Tokens) -> Tensor:
        mean = attention_mass(tokens).mean(dim=(1, 2))
        return mean[:, None].expand(-1, tokens.keys.shape[1], -1)
