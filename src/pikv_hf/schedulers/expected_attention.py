from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.rotary import Rotary
from ..validation import check_flag, check_number, check_whole
from .base import Candidates, Needs, Scheduler

# Candidates whose keys are copied to float32 at a time.
BLOCK = 1024


@dataclass(frozen=True)
class ExpectedAttention(Scheduler):
    """Keeps tokens that future queries will attend to (Devoto et al., arXiv 2510.00636, sec. 3).

    Position-free queries are assumed to be normally distributed. Mean m and covariance S of the
    newest `window_size` queries are rotated by the mean rotation of the next `future` positions.
    The expected exp(scale * q k) is exp(scale * m k + scale^2 * k S k / 2). A token's score is its
    share of these among all tokens but sinks, averaged over the query heads of a KV head, plus
    `epsilon`, times the norm of its value (of a latent: of the dims that are the value, too). The
    paper uses all queries of the prompt; a larger `window_size` takes memory.

    Args:
        window_size: newest tokens whose queries count.
        future: positions ahead over which the rotation is averaged.
        sinks: first tokens of each row, which are kept, and whose queries do not count; >= 0.
        use_covariance: use S; False = take S for 0.
        use_vnorm: multiply by the norm of the value.
        epsilon: addend of every share, >= 0.
    """

    window_size: int = 256
    future: int = 512
    sinks: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        for name, minimum in (("window_size", 1), ("future", 1), ("sinks", 0)):
            check_whole(name, getattr(self, name), minimum)
        for name in ("use_covariance", "use_vnorm"):
            check_flag(name, getattr(self, name))
        check_number("epsilon", self.epsilon)

    @property
    def needs(self) -> Needs:
        inputs = frozenset({"rotary", "values"} if self.use_vnorm else {"rotary"})
        return Needs(queries=self.window_size, inputs=inputs, sinks=self.sinks)

    def scores(self, tokens: Candidates) -> Tensor:
        number = tokens.number().expand(tokens.keys.shape[:3])
        shares = self._shares(tokens, number < self.sinks)
        if self.use_vnorm:
            values = tokens.values if tokens.latent_rank is None else tokens.keys
            assert values is not None, "they are among the needs"
            shares = (shares + self.epsilon) * values[..., : tokens.latent_rank].float().norm(
                dim=-1
            )
        return shares.masked_fill((number >= 0) & (number < self.sinks), torch.inf)

    def _shares(self, tokens: Candidates, hidden: Tensor) -> Tensor:
        """Return the mean share [R, H, T] of the expected attention; 0 where `hidden` [R, H, T]."""
        blocks = *tokens.keys.split(BLOCK, dim=2), tokens.open_keys
        rotary, free, weight = self._free_queries(tokens)
        total = weight.sum(2, keepdim=True).clamp_min(1)
        shares = torch.zeros(hidden.shape, device=hidden.device)
        for queries in free.unbind(2):  # [R, H, m, D] of one query head of each KV head
            mean = (queries * weight).sum(2, keepdim=True) / total
            turned = tokens.scale * rotary.ahead(mean, tokens.seen, self.future)
            covariance = None
            if self.use_covariance:
                spread = tokens.scale * (queries - mean) * weight
                spread = rotary.ahead(spread, tokens.seen, self.future)
                covariance = spread.transpose(-1, -2) @ spread / total
            exponents = torch.cat([_exponents(keys, turned, covariance) for keys in blocks], dim=2)
            exponents[..., : hidden.shape[2]].masked_fill_(hidden, -torch.inf)
            shares += exponents.softmax(-1)[..., : hidden.shape[2]]
        return shares / free.shape[2]

    def _free_queries(self, tokens: Candidates) -> tuple[Rotary, Tensor, Tensor]:
        """Return queries [R, H, G, m, D] without positions, and weights [R, 1, m, 1], 0 or 1."""
        queries, rotary = tokens.queries, tokens.rotary
        assert rotary is not None, "it is among the needs"
        if queries is None:  # none yet: all tokens are equally likely
            queries = tokens.keys.new_zeros(*tokens.keys.shape[:2], 1, 1, tokens.keys.shape[3])
        columns = torch.arange(tokens.seen - queries.shape[3], tokens.seen, device=queries.device)
        number = tokens.number().expand(tokens.positions.shape)
        first = tokens.positions.masked_fill(number < 0, tokens.seen).amin((1, 2))
        counts = queries.any(-1).any((1, 2)) & (columns >= first[:, None] + self.sinks)
        return rotary, rotary.unrotate(queries, columns), counts[:, None, :, None].float()


def _exponents(keys: Tensor, mean: Tensor, covariance: Tensor | None) -> Tensor:
    """Return m k + k S k / 2 [R, H, T] of `keys` [R, H, T, D], m = `mean` [R, H, 1, D], float32."""
    keys = keys.float()
    exponents = (keys @ mean.transpose(-1, -2))[..., 0]
    if covariance is not None:
        exponents += (keys @ covariance * keys).sum(-1) / 2
    return exponents
