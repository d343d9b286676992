from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Candidates, Scheduler
from .knorm import BLOCK


@dataclass(frozen=True)
class KeyDiff(Scheduler):
    """Keeps keys that differ most from other keys (Park et al., arXiv 2504.15364, section 3).

    The score is minus the cosine between a key and the mean direction of all keys of its KV head,
    tail tokens included. Needs no queries.
    """

    def scores(self, tokens: Candidates) -> Tensor:
        blocks = tokens.keys.split(BLOCK, dim=2)
        valid = [None] * len(blocks) if tokens.valid is None else tokens.valid.split(BLOCK, dim=2)
        total = _directions(tokens.open_keys).sum(dim=2)
        directions = tokens.keys  # of the newest block
        for block, is_token in zip(blocks, valid, strict=True):
            directions = _directions(block)
            counted = directions if is_token is None else directions * is_token[..., None]
            total += counted.sum(dim=2)
        mean = F.normalize(total, dim=-1)[..., None]
        cosines = [_directions(block) @ mean for block in blocks[:-1]]
        return -torch.cat([*cosines, directions @ mean], dim=2)[..., 0]


def _directions(keys: Tensor) -> Tensor:
    return F.normalize(keys.float(), dim=-1)
