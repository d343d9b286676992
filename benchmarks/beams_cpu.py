"""Beam search: reordering the beams, and a decode step of 4 beams that share their prompt.

DynamicCache copies all keys and values to reorder; PiKVCache changes which pages a beam reads.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import Result, Timing, fill, interleaved, start
from decode_cpu import DIM, KV_HEADS, LAYERS, random_model
from torch import Tensor
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

BEAMS = 4
LOGITS_GOAL = 1e-5


def forked(cache: Any, tokens: int, dtype: torch.dtype) -> Any:
    """The cache with `tokens` random tokens, repeated for every beam."""
    fill(cache, tokens, (KV_HEADS, DIM, DIM), dtype).batch_repeat_interleave(BEAMS)
    return cache


def reorder(cache: Any) -> Callable[[], None]:
    order = torch.tensor([0, 0, 2, 1])
    return lambda: cache.reorder_cache(order)


def decode(model: Any, cache: Any) -> Callable[[], Tensor]:
    token = torch.arange(BEAMS)[:, None]
    return lambda: model(input_ids=token, **with_cache(cache)).logits


def logits_difference(tokens: int, reorders: int = 3) -> float:
    """Largest difference of the fp32 logits, after reorders with a decode step behind each."""
    stock, ours = random_model("narrow", torch.float32), random_model("narrow", torch.float32)
    theirs = forked(DynamicCache(config=stock.config), tokens, torch.float32)
    mine = forked(PiKVCache(ours), tokens, torch.float32)
    difference = torch.zeros(())
    for _ in range(reorders):
        reorder(theirs)()
        reorder(mine)()
        difference = (decode(stock, theirs)() - decode(ours, mine)()).abs().max()
    return difference.item()


def cells(stock: Timing, ours: Timing) -> list[str]:
    shown = [f"{t.median:.2f} ({t.least:.2f})" for t in (stock, ours)]
    return [*shown, f"{stock.median / ours.median:.1f}x"]


def main() -> None:
    quick = start(__doc__)
    rounds = 5 if quick else 15
    dtype = torch.bfloat16
    stock, ours = random_model("narrow", dtype), random_model("narrow", dtype)
    result = Result(
        "beams_cpu",
        f"Beam search with {BEAMS} beams of one prompt",
        f"model and widths of decode_cpu (narrow, {LAYERS} layers), bf16; ms, median (least) of "
        f"{rounds} interleaved rounds, 1 thread, process CPU time",
        ["prompt tokens", "what", "DynamicCache ms", "PiKVCache ms", "faster"],
    )
    for tokens in (2048, 8192):
        theirs = forked(DynamicCache(config=stock.config), tokens, dtype)
        mine = forked(PiKVCache(ours), tokens, dtype)
        times = interleaved({"stock": reorder(theirs), "ours": reorder(mine)}, rounds)
        result.add(tokens, "reorder", *cells(times["stock"], times["ours"]))
        steps = {"stock": decode(stock, theirs), "ours": decode(ours, mine)}
        times = interleaved(steps, rounds)
        result.add(tokens, "decode step", *cells(times["stock"], times["ours"]))
    difference = logits_difference(2048)
    met = difference <= LOGITS_GOAL
    result.goal(f"fp32 logits after 3 reorders within {LOGITS_GOAL}", difference, met)
    result.publish(quick)


if __name__ == "__main__":
    main()
