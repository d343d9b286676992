from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import check_count
from .attention_mass import attention_mass
from .base import Candidates, Needs, Scheduler, Traits

NOTE = "pikv_layer_sum"


@dataclass(frozen=True)
class PiKVLayerSum(Scheduler):
    """Keeps tokens that all layers attend to (PiKV, arXiv 2508.06526, "Duo": u_i = sum of a_i^(l)).

    a_i is the attention that the newest `window_size` tokens pay token i, averaged over these
    tokens and over all heads of a layer, so that its heads keep the same tokens. A layer chooses as
    soon as it has run, by the sum over the layers up to itself; only the last layer has the whole
    sum. A layer adds nothing for tokens that it has evicted, nor while it is within its budget.

    Args:
        window_size: newest tokens whose attention counts.
    """

    window_size: int = 64

    def __post_init__(self) -> None:
        check_count("window_size", self.window_size)

    @property
    def traits(self) -> Traits:
        return Traits(is_per_head=False, links_layers=True)

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window_size)

    def scores(self, tokens: Candidates) -> Tensor:
        mass = attention_mass(tokens).mean(dim=(1, 2))
        at = tokens.positions[:, 0]  # heads have equal positions
        before = tokens.notes.get(NOTE)  # [R, columns of the sequence]
        total = torch.zeros_like(mass[:, :1]).expand(-1, tokens.seen) if before is None else before
        total = total.to(mass.device).scatter_add(1, at, mass)
        tokens.notes[NOTE] = total
        return total.gather(1, at)[:, None].expand(-1, tokens.keys.shape[1], -1)
