from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..validation import check_count
from .attention_mass import attention_mass
from .base import Candidates, Needs, Scheduler, Traits

NOTE = "fastv"


@dataclass(frozen=True)
class FastV(Scheduler):
    """Lets layer `layer` choose for all later ones (Chen et al., arXiv 2403.06764, section 4.1).

    It ranks tokens by the attention that the newest tokens pay them, averaged over heads; this
    layer and all later layers keep the same tokens. Earlier layers keep everything, and only the
    others have the budget: R = 50 % in the paper is a budget of 0.5. The paper prunes a prompt
    once; here the choice is made anew whenever tokens are sealed.

    Args:
        layer: the first layer that evicts, among the paged layers; at least 1.
        window_size: newest tokens whose attention counts.
    """

    layer: int = 2
    window_size: int = 1

    def __post_init__(self) -> None:
        for name in ("layer", "window_size"):
            check_count(name, getattr(self, name))

    @property
    def traits(self) -> Traits:
        return Traits(is_per_head=False, exceeds_budget=True, links_layers=True)

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window_size)

    def check(self, model: PreTrainedModel, layers: int) -> None:
        if self.layer >= layers:
            raise ValueError(
                f"`layer` of {self} is {self.layer}, but only {layers} layers of the model are paged, "
                f"so that none would drop anything; it must be less than {layers}."
            )

    def layer_budget(self, budget: int, available: int, layer: int, layers: int) -> int:
        return available if layer < self.layer else budget

    def scores(self, tokens: Candidates) -> Tensor:
        # Layers that keep everything never call this: layer `layer` is the first that does.
        if NOTE not in tokens.notes:
            tokens.notes[NOTE] = attention_mass(tokens).mean(dim=(1, 2))
        ranks = tokens.notes[NOTE].to(tokens.keys.device)
        return ranks[:, None].expand(-1, tokens.keys.shape[1], -1)
