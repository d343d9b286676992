from dataclasses import dataclass

from torch import Tensor

from .attention_mass import attention_mass
from .base import Candidates, Needs, Scheduler, Traits


@dataclass(frozen=True)
class Tova(Scheduler):
    """Keeps tokens that the newest one attends to (Oren et al., arXiv 2401.06104, section 3.2).

    TOVA: the score is the attention of the newest token, averaged over all heads of the layer, so
    that every KV head keeps the same tokens.
    """

    @property
    def needs(self) -> Needs:
        return Needs(queries=1)

    @property
    def traits(self) -> Traits:
        return Traits(is_per_head=False)

    def scores(self, tokens: Candidates) -> Tensor:
        mean = attention_mass(tokens).mean(dim=(1, 2))
        return mean[:, None].expand(-1, tokens.keys.shape[1], -1)
