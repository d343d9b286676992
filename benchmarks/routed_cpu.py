"""What a decode step costs that reads an eighth of the pages, beside one that reads all of them.

A step is the append of one token, the selection of pages, and attention, in one layer. Every 64th step
seals a page; the median step does not.
"""

from typing import Any

import torch
from append_cpu import DTYPE, SHAPE, one_layer_model
from common import Result, fill, interleaved, random_states, start
from torch import Tensor

from pikv_hf import PiKVCache
from pikv_hf.attention.function import pikv_attention
from pikv_hf.routers import Clusters, Hierarchical, PageRouter, Quest, RandomPages

HEADS, DIM = SHAPE[:2]
GROUPS, FRACTION, PAGES = 8, 0.125, (64, 32)
LENGTHS = (16384, 65536)
GOALS = {None: 3.0, "int4": 2.0}
ROUTERS: dict[str, PageRouter] = {
    "quest": Quest(fraction=FRACTION),
    "hierarchical": Hierarchical(fraction=FRACTION),
    "clusters": Clusters(fraction=FRACTION),
    "random": RandomPages(fraction=FRACTION),
}


class Step:
    """A step of a cache of one layer that holds `tokens` random tokens."""

    def __init__(self, tokens: int, dtype: torch.dtype = DTYPE, **methods: Any) -> None:
        self.model = one_layer_model(SHAPE)
        self.cache = fill(PiKVCache(self.model, **methods), tokens, SHAPE, dtype)
        self.query = random_states(2, 1, (HEADS * GROUPS, DIM, 0), dtype)[0]
        self.states = random_states(1, 1, SHAPE, dtype)

    def __call__(self) -> Tensor:
        self.cache.layers[0].update(*self.states)
        module = self.model.model.layers[0].self_attn
        return pikv_attention(module, self.query, *self.states, None, scaling=DIM**-0.5)[0]


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "routed_cpu",
        f"A decode step that reads {FRACTION:.3g} of the pages, against one that reads all",
        f"one layer, {HEADS} KV heads of {GROUPS} query heads, head dim {DIM}, bf16, batch 1; process "
        "CPU time of append, selection and attention, median of interleaved rounds; speed is the time "
        "without a router, over the time",
        ["compressor", "tokens", "page size", "router", "ms", "speed"],
    )
    rounds = 5 if quick else 25
    for compressor in (None, "int8", "int4"):
        for tokens in LENGTHS:
            for page_size in PAGES:
                routers = ROUTERS if compressor is None else {"quest": ROUTERS["quest"]}
                settings = {"compressor": compressor, "page_size": page_size}
                steps = {"-": Step(tokens, **settings)} | {
                    name: Step(tokens, router=router, **settings)
                    for name, router in routers.items()
                }
                times = interleaved(dict(steps), rounds)
                dense = times["-"].median
                for name, timing in times.items():
                    cells = (compressor or "identity", tokens, page_size, name)
                    result.add(*cells, timing.median, dense / timing.median)
                if compressor in GOALS and page_size == 64:
                    speed = dense / times["quest"].median
                    text = f"quest, {compressor or 'identity'}, {tokens} tokens: times as fast"
                    result.goal(text, speed, speed >= GOALS[compressor])
    result.publish(quick)


if __name__ == "__main__":
    main()
