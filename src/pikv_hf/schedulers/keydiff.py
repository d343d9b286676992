from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Scheduler, Tokens


@dataclass(frozen=True)
class KeyDiff(Scheduler):
    """Keys that differ most from the others stay (Park et al., arXiv 2504.15364, section 3).

    The score is minus the cosine between a key and the mean direction of all keys of its KV head,
    those of the open tokens included. Needs no queries.
    """

    def scores(self, tokens: Tokens) -> Tensor:
        directions = F.normalize(tokens.keys.float(), dim=-1)
        if tokens.valid is not None:
            directions = directions * tokens.valid[..., None]
        newest = F.normalize(tokens.open_keys.float(), dim=-1)
        mean = torch.cat([directions, newest], dim=2).mean(dim=2, keepdim=True)
        return -F.cosine_similarity(directions, mean, dim=-1)
