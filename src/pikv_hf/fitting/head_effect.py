"""What a layer's attention loses when one of its KV heads reads sinks and recent tokens only.

Shapes: H KV heads, G queries per KV head, m queries, T tokens, D head dim, o hidden size.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from pikv_kernels import add_sink, partial_attention
from torch import Tensor

from ..schedulers import Candidates, Needs, Scheduler

QUERIES = 64  # newest tokens of each text whose attention is looked at


class Effect(NamedTuple):
    """Sums of squares over queries: `changes` [H] of the layer's output, one for each head that
    streams, and `output` of the layer itself; float64."""

    changes: Tensor
    output: Tensor

    @property
    def scores(self) -> Tensor:
        """Norm of the change over the norm of the output, [H]."""
        return (self.changes / self.output.clamp_min(1e-300)).sqrt().float()


@dataclass(frozen=True)
class HeadEffect(Scheduler):
    """Measures a whole text of one row as it is sealed, then lets go of it.

    For each KV head: the squared change of the output of the layer's attention (behind its output
    projection; a gate in between is not applied) when only this head reads the first `sinks` and the
    newest `recent` tokens. That is the definition of retrieval heads in DuoAttention (Xiao et al.,
    arXiv 2410.10819, section 2.2), one layer at a time.

    `sums` holds what the texts read so far add up to, by layer.
    """

    sinks: int
    recent: int
    sums: dict[int, Effect] = field(default_factory=dict, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(queries=QUERIES, inputs=frozenset({"values", "output", "module"}))

    def scores(self, tokens: Candidates) -> Tensor:
        return tokens.positions.double()

    def keep(self, tokens: Candidates, budget: int) -> Tensor:
        if tokens.values is None or not tokens.values.shape[-1]:
            raise ValueError(
                f"layer {tokens.layer_idx} caches latents, which all its heads read (MLA): there are "
                "no heads to keep or to drop."
            )
        new = head_effect(tokens, self.sinks, self.recent)
        old = self.sums.get(tokens.layer_idx)
        self.sums[tokens.layer_idx] = new if old is None else Effect(*map(torch.add, old, new))
        return super().keep(tokens, budget)


def head_effect(tokens: Candidates, sinks: int, recent: int) -> Effect:
    """Of the observed queries of one row without padding."""
    assert tokens.values is not None and tokens.open_values is not None
    queries, output = tokens.queries, tokens.output
    assert queries is not None and output is not None
    keys = torch.cat([tokens.keys, tokens.open_keys], dim=2)
    values = torch.cat([tokens.values, tokens.open_values], dim=2)
    at = torch.arange(tokens.seen, device=keys.device)
    asked_at = at[-queries.shape[3] :, None]
    causal = at <= asked_at
    streamed = causal & ((at < sinks) | (at > asked_at - recent))
    full, near = (_outputs(tokens, queries, keys, values, mask) for mask in (causal, streamed))
    weight = output.float().view(len(output), *full.shape[:2], -1)
    change = torch.einsum("hgmd,ohgd->hmo", full - near, weight)
    layer = torch.einsum("hgmd,ohgd->mo", full, weight)
    sums = change.double().square().sum((1, 2)), layer.double().square().sum()
    return Effect(*(t.cpu() for t in sums))


def _outputs(
    tokens: Candidates, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """What the heads return, [H, G, m, Dv] in float32, where `mask` [m, T] lets them see."""
    groups, asked = queries.shape[2:4]
    additive = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    additive = additive.masked_fill(~mask, torch.finfo(torch.float32).min).repeat(groups, 1)
    parts = queries.flatten(2, 3).float(), keys.float(), values.float()
    out, lse = partial_attention(*parts, additive[None, None], tokens.scale)
    sink = getattr(tokens.module, "sinks", None)  # as in gpt-oss: [Hq]
    if sink is not None:
        sink = sink.float().view(1, -1, groups, 1).expand(-1, -1, -1, asked)
        out = add_sink(out, lse, sink.flatten(2))
    return out[0].unflatten(1, (groups, asked))
