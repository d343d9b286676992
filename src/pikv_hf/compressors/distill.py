import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import Factors, LowRankAffine, outside
from .moments import Moments

WIDTH = 2  # hidden units per stored number


@dataclass(frozen=True)
class Distill(LowRankAffine):
    """`LowRankAffine` with a network that predicts, from the codes, the part of x they lack.

    x is stored as c = x down, and decoded as c up + bias + gelu(c hidden + hidden_bias) out: a
    network of one hidden layer for each layer and KV head, which `pikv calibrate` trains to give
    the output of attention over the original keys and values (after Hinton et al., arXiv
    1503.02531). Training begins with out = 0, which is `LowRankAffine`. It keeps out down = 0, so
    that decoded states are encoded again without a loss.

    Attention reads c and the hidden units, 3 r numbers, instead of keys and values.

    Args:
        calibration: the file that `pikv calibrate` made for the model, which also fixes r.
    """

    name: ClassVar[str] = "distill"
    block_tokens: ClassVar[int | None] = 2048  # tokens whose hidden units are made at a time

    @classmethod
    def initial(cls, moments: Moments, rank: int, generator: torch.Generator) -> Factors:
        free = super().initial(moments, rank, generator)
        _, spread = moments.axes(rank, centred=True)
        heads, rank = free["up"].shape[:2]
        width = WIDTH * rank
        drawn = torch.randn(heads, rank, width, generator=generator) / math.sqrt(rank)
        # Codes differ much in size: scaled, each code moves the hidden units equally.
        size = spread[:, :rank].clamp_min(spread[:, :1] * 1e-6).sqrt().float()
        hidden = drawn / size[..., None]
        centre = (moments.mean.float()[:, None] @ free["down"]) @ hidden
        out = torch.zeros(heads, width, free["up"].shape[-1])
        return free | {"hidden": hidden, "hidden_bias": -centre.squeeze(1), "out": out}

    @classmethod
    def constrained(cls, free: Factors) -> Factors:
        factors = super().constrained(free)
        out = outside(free["out"], factors)
        hidden = {name: free[name] for name in ("hidden", "hidden_bias")}
        return factors | hidden | {"up": torch.cat([factors["up"], out], dim=1)}

    @classmethod
    def rescaled(cls, factors: Factors, size: Tensor) -> Factors:
        factors = super().rescaled(factors, size)
        linear, out = factors["up"].tensor_split([factors["down"].shape[-1]], dim=1)
        up = torch.cat([linear, out * size[:, None, None]], dim=1)
        return factors | {"up": up, "hidden": factors["hidden"] / size[:, None, None]}

    @classmethod
    def features(cls, codes: Tensor, factors: Factors) -> Tensor:
        hidden = codes @ factors["hidden"] + factors["hidden_bias"][:, None]
        return torch.cat([codes, F.gelu(hidden)], dim=-1)
