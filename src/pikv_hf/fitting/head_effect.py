"""The change of a layer's attention when one KV head reads only sinks and recent tokens.

Shapes: H KV heads, G queries per KV head, m queries, T tokens, D head dim, o hidden size.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from pikv_kernels import lowest_score, merge_partials, partial_attention
from torch import Tensor

from ..schedulers import Candidates, Needs, Scheduler

QUERIES = 64  # newest tokens of each text, whose attention is compared


class Effect(NamedTuple):
    """Sums of squares over queries, in float64.

    `changes` [H]: change of the layer's attention output when this head alone streams.
    `output` []: that output when no head streams.
    """

    changes: Tensor
    output: Tensor

    @property
    def scores(self) -> Tensor:
        """Norm of the change divided by the norm of the output, [H]."""
        return (self.changes / self.output.clamp_min(1e-300)).sqrt().float()


@dataclass(frozen=True)
class HeadEffect(Scheduler):
    """Measures each KV head on a text of one row when it is sealed, and then evicts the text.

    It measures the squared change of the output of the layer's attention (after the output
    projection; an output gate is not applied) when this head, and no other, reads only the first
    `sinks` and the newest `recent` tokens. This is the definition of retrieval heads in
    DuoAttention (Xiao et al., arXiv 2410.10819, section 2.2), applied to one layer at a time.

    `sums` holds the sums over all texts read so far, by layer.
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
                f"layer {tokens.layer_idx} caches latents, which all its heads read (MLA): there "
                "are no heads to keep or to drop."
            )
        new = head_effect(tokens, self.sinks, self.recent)
        old = self.sums.get(tokens.layer_idx)
        self.sums[tokens.layer_idx] = new if old is None else Effect(*map(torch.add, old, new))
        return super().keep(tokens, budget)


def head_effect(tokens: Candidates, sinks: int, recent: int) -> Effect:
    """Measure the KV heads of a layer with the observed queries of one row without padding."""
    assert tokens.values is not None and tokens.open_values is not None
    queries, output = tokens.queries, tokens.output
    assert queries is not None and output is not None
    keys = torch.cat([tokens.keys, tokens.open_keys], dim=2)
    values = torch.cat([tokens.values, tokens.open_values], dim=2)
    positions = torch.arange(tokens.seen, device=keys.device)
    query_positions = positions[-queries.shape[3] :, None]
    causal = positions <= query_positions
    streamed = causal & ((positions < sinks) | (positions > query_positions - recent))
    full, near = (_outputs(tokens, queries, keys, values, mask) for mask in (causal, streamed))
    weight = output.float().view(len(output), *full.shape[:2], -1)
    change = torch.einsum("hgmd,ohgd->hmo", full - near, weight)
    layer = torch.einsum("hgmd,ohgd->mo", full, weight)
    sums = change.double().square().sum((1, 2)), layer.double().square().sum()
    return Effect(*(t.cpu() for t in sums))


def _outputs(
    tokens: Candidates, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """Return the outputs [H, G, m, Dv] in float32 of attention under the boolean `mask` [m, T]."""
    groups, num_queries = queries.shape[2:4]
    additive = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    additive = additive.masked_fill(~mask, lowest_score(torch.float32)).repeat(groups, 1)
    parts = queries.flatten(2, 3).float(), keys.float(), values.float()
    result = partial_attention(*parts, additive[None, None], tokens.scale)
    sink = getattr(tokens.module, "sinks", None)  # as in gpt-oss: [Hq]
    if sink is not None:
        sink = sink.float().view(1, -1, groups, 1).expand(-1, -1, -1, num_queries).flatten(2)
    out = merge_partials([result], sink)
    return out[0].unflatten(1, (groups, num_queries))
