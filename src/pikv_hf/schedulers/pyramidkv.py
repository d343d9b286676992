from dataclasses import dataclass, field, replace

from torch import Tensor

from .base import Candidates, Scheduler, Traits
from .snapkv import SnapKV
from .wrapper import Wrapper


@dataclass(frozen=True)
class PyramidKV(Wrapper):
    """Keeps more tokens in lower layers (Cai et al., arXiv 2406.02069, section 4.1).

    Budgets decrease linearly from layer to layer; their mean is the budget of the cache. The last
    layer keeps 1/`beta` of this mean, or more if the first layer has too few tokens for its budget.

    Args:
        scorer: scheduler that chooses the tokens of each layer.
        beta: mean budget divided by the budget of the last layer, > 1.
    """

    scorer: Scheduler = field(default_factory=SnapKV)
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.beta, int | float) or not self.beta > 1:
            raise ValueError(f"`beta` is {self.beta!r}; it must be a number greater than 1.")
        if self.scorer.traits.exceeds_budget:
            raise ValueError(
                f"`scorer` is {self.scorer!r}, which has budgets of its own for each layer; it must "
                "be one that leaves them to PyramidKV, such as SnapKV()."
            )

    @property
    def traits(self) -> Traits:
        return replace(self.scorer.traits, links_layers=True)

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        if layers == 1:
            return budget
        first = min(2 * budget - budget / self.beta, available)
        last = max(2 * budget - first, 0)
        return round(first + (last - first) * layer / (layers - 1))

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        return self.scorer.keep(tokens, budget)
