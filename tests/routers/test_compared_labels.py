"""Which gate's experts agreement compares: the same one's for the query and for the pages."""

from dataclasses import dataclass, field

import pytest
import torch
from helpers import generate, paged, prompt, spans_of, tail_labels, tiny

from pikv_hf import PiKVCache
from pikv_hf.attach.binding import binding_of
from pikv_hf.routers import TopK


@dataclass(frozen=True)
class Noting(TopK):
    """Notes the experts that it was given for queries, by layer and position."""

    asked: dict = field(default_factory=dict, hash=False, compare=False)

    def scores(self, query, pages):
        self.asked.setdefault(query.layer_idx, {})[int(query.positions())] = query.experts[0]
        return super().scores(query, pages)


@pytest.mark.parametrize("source", ["previous_layer", "previous_token"])
def test_query_and_pages_have_labels_of_one_gate(source) -> None:
    model = tiny("mixtral", num_hidden_layers=3)
    router = Noting(top_pages=1, experts_from=source)
    cache = PiKVCache(model, router=router, page_size=4, window=4)
    chosen: dict[int, list[torch.Tensor]] = {}
    for idx, gate in binding_of(model).gate_of.items():
        gate.hook(lambda choice, idx=idx: chosen.setdefault(idx, []).append(choice()[0]))
    generate(model, prompt(model, (29,)), cache)
    for layer in paged(cache):
        idx = layer.state.layer_idx
        by = idx - 1 if source == "previous_layer" and idx else idx
        of_tokens = torch.cat(chosen[by])
        held = [*spans_of(layer, [0]), tail_labels(layer)]
        held = torch.cat([tokens["experts"][0, 0] for tokens in held])
        assert torch.equal(held.long(), of_tokens)
        back = 0 if by < idx else 1  # the token itself, or the one before
        assert router.asked[idx]
        for position, experts in router.asked[idx].items():
            assert torch.equal(experts[0].long(), of_tokens[position - back])
