from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from pikv_kernels import is_fast_bfloat16
from torch import Tensor

from ..model.latent import LatentQuery
from ..validation import check_number
from .base import Candidates, Needs, Scheduler, TokenConstants, Traits
from .snapkv import SnapKV
from .top_tokens import best_places, mask_of_best
from .wrapper import Wrapper

# Numbers in a block of projected values, which fits into a CPU's cache.
BLOCK = 2**19
# On accelerators blocks are larger, because each of them launches kernels.
BLOCK_ON_ACCELERATORS = 2**24


@dataclass(frozen=True)
class CriticalKV(Wrapper, TokenConstants):
    """Keeps tokens that change the output most (Feng et al., arXiv 2502.03805, algorithm 1).

    A KV head chooses in two stages: a share `first_stage_ratio` of its tokens by the highest score,
    and the rest by the highest (score + `epsilon`) times the L1 norm of the value after the layer's
    output projection, averaged over the query heads of the KV head. The paper's bound of the error
    needs both stages. The norm is computed once, when a token leaves the tail, and kept with the
    token: 4 bytes for each KV head.

    Tail tokens have no part in the budget of the stages. In `AdaKV(CriticalKV(...))` the scores
    alone share the budget among heads; each head then chooses in two stages, beyond its share
    `alpha`.

    Args:
        scorer: scheduler whose scores are attention, or an estimate of it.
        first_stage_ratio: share of tokens that the scores alone choose, in [0, 1].
        epsilon: addend of every score in the second stage, >= 0.
    """

    constant_inputs: ClassVar[frozenset[str]] = frozenset({"values", "output", "module"})

    scorer: Scheduler = field(default_factory=SnapKV)
    first_stage_ratio: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        scorer = self.scorer
        is_attention = (
            bool(scorer.needs.queries or scorer.needs.statistics) and scorer.traits.is_per_head
        )
        if not is_attention or not scorer.traits.decides_by_scores:
            raise ValueError(
                f"`scorer` is {scorer!r}; it must be one whose scores are the attention that each KV "
                "head pays, such as SnapKV(). With AdaKV: AdaKV(CriticalKV(SnapKV()))."
            )
        check_number("first_stage_ratio", self.first_stage_ratio, "[0, 1]")
        check_number("epsilon", self.epsilon)

    @property
    def needs(self) -> Needs:
        return super().needs | Needs(constants=self)

    def constants(self, tokens: Candidates) -> Tensor:
        return projected_norms(tokens)[..., None]

    @property
    def traits(self) -> Traits:
        return replace(super().traits, decides_by_scores=False, numbers_heads=True)

    def reranked(self, tokens: Candidates, ranked: Tensor, counts: Tensor) -> Tensor:
        first = (counts.double() * self.first_stage_ratio).long()
        assert tokens.constants is not None, "they are among the needs"
        second = (ranked + self.epsilon) * tokens.constants[..., 0]
        # Sinks remain above all other places, and places without a token below.
        second = torch.where(ranked.isfinite(), second, ranked)
        return second.masked_fill(mask_of_best(ranked, first), torch.inf)

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        ranked = self.ranked(tokens, budget)
        counts = torch.full(ranked.shape[:2], min(budget, ranked.shape[2]), device=ranked.device)
        return best_places(self.reranked(tokens, ranked, counts), budget)


def projected_norms(tokens: Candidates) -> Tensor:
    """Return the L1 norm [R, H, T] float32 of each value after the output projection.

    The norm is a mean over the query heads of each KV head. Memory is needed for one head and one
    block of tokens at a time. Latents (MLA) are first expanded to the values of each query head.
    """
    assert tokens.output is not None and tokens.values is not None, "they are the constant inputs"
    output, values, up = tokens.output, tokens.values, None
    dtype = torch.bfloat16 if is_fast_bfloat16(values) else torch.float32
    dim = values.shape[3]
    if dim == 0:
        dim, rank = tokens.module.v_head_dim, tokens.module.kv_lora_rank
        each = tokens.keys.expand(-1, output.shape[1] // dim, -1, -1)
        latent = LatentQuery(tokens.module, each, rank)
        values, up = tokens.keys[..., :rank], latent.weight[:, latent.nope_dim :].to(dtype).mT
    rows, heads, count = values.shape[:3]
    groups = output.shape[1] // dim // heads
    max_numbers = BLOCK if values.device.type == "cpu" else BLOCK_ON_ACCELERATORS
    norms = torch.zeros(heads, rows * count, dtype=torch.float32, device=values.device)
    flat = values.transpose(0, 1).flatten(1, 2)
    for head, weight in enumerate(output.split(dim, dim=1)):
        target = norms[head // groups]
        size = max(1, max_numbers // len(output))
        for block, sums in zip(flat[head // groups].split(size), target.split(size), strict=True):
            states = block.to(dtype) if up is None else block.to(dtype) @ up[head]
            sums += (states @ weight.to(dtype).T).float().abs_().sum(-1)
    return (norms / groups).unflatten(1, (rows, count)).transpose(0, 1)
