"""What dealing the pages of a layer to eight places costs, where all of them are one CPU.

Attention then reads eight stores and merges their results: what is left of the time is the price of
the merge, as nothing is read at a time. Every 64th step seals a page; the median step does not.
"""

from dataclasses import dataclass

import torch
from append_cpu import DTYPE, SHAPE
from common import Result, interleaved, start
from routed_cpu import Step

from pikv_hf.placements import Placement, Spread
from pikv_hf.placements.sharding import Dealt
from pikv_hf.placements.site import NO_SITE, PlacedLayer, Site
from pikv_hf.storage.places import Places
from pikv_hf.storage.tiers import Near, Tier

PLACES = 8
# Tokens, and the cost over one place that is accepted.
GOALS = {16384: 1.12, 65536: 1.08}


@dataclass(frozen=True)
class Eight(Placement):
    """Deals pages in turn to eight places that are one device."""

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        return [Near(device)]

    def places(self, layer: PlacedLayer, site: Site = NO_SITE) -> Places:
        return Dealt(Spread(), layer, Site(devices=(torch.device("cpu"),) * PLACES))


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "places_cpu",
        f"A decode step over pages in {PLACES} places, against one place",
        f"one layer, {SHAPE[0]} KV heads of 8 query heads, head dim {SHAPE[1]}, batch 1, pages of 64; "
        "process CPU time of append and attention, median of interleaved rounds; error is the largest "
        "difference of the output, in float32",
        ["compressor", "dtype", "tokens", "ms, one place", f"ms, {PLACES} places", "cost", "error"],
    )
    rounds = 7 if quick else 41
    for compressor in (None, "int4"):
        for tokens, limit in GOALS.items():
            for dtype in (DTYPE, torch.float32):
                steps = {
                    name: Step(tokens, dtype, compressor=compressor, placement=placement)
                    for name, placement in (("one", None), ("many", Eight()))
                }
                one, many = (step() for step in steps.values())
                error = (one - many).abs().max().item()
                times = interleaved(dict(steps), rounds)
                cost = times["many"].median / times["one"].median
                name = str(dtype).removeprefix("torch.")
                medians = times["one"].median, times["many"].median
                cells = (compressor or "identity", name, tokens, *medians, cost)
                result.add(*cells, f"{error:.1e}")
                if compressor is None and dtype == DTYPE:
                    result.goal(f"{tokens} tokens in {PLACES} places: cost", cost, cost <= limit)
                if dtype == torch.float32:
                    text = f"{compressor or 'identity'}, {tokens} tokens: error in float32"
                    result.goal(text, error, error <= 1e-6)
    result.publish(quick)


if __name__ == "__main__":
    main()
