"""Appending one token to one layer: PagedLayer against DynamicLayer.update, which copies it all.

Appends of PiKVCache are timed 64 at a time, so that each measurement contains one sealed page.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import Result, Timing, fill, interleaved, random_states, start, write
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache

SHAPE = (4, 128, 128)
DTYPE = torch.bfloat16
PAGE = 64
GOALS = {16384: 25.0, 65536: 300.0}
FLAT_GOAL = 1.5


def one_layer_model(shape: tuple[int, int, int] = SHAPE, **fields: int) -> Qwen3MoeForCausalLM:
    """A model whose cache has one layer of `shape`, that of Qwen3-30B-A3B; small in all else, unless
    `fields` of its config say so."""
    small = {"hidden_size": 64, "num_experts": 2, "num_experts_per_tok": 1}
    config = Qwen3MoeConfig(
        vocab_size=64,
        num_hidden_layers=1,
        num_attention_heads=8 * shape[0],
        num_key_value_heads=shape[0],
        head_dim=shape[1],
        **{**small, "moe_intermediate_size": 16, **fields},
    )
    return Qwen3MoeForCausalLM(config).eval()


def appends(cache: Any, tokens: int, count: int) -> Callable[[], None]:
    """`count` appends of one token to a layer that held `tokens` tokens."""
    layer = fill(cache, tokens, SHAPE, DTYPE).layers[0]
    new = random_states(99, 1, SHAPE, DTYPE)

    def run() -> None:
        for _ in range(count):
            write(layer, *new)

    return run


def main() -> None:
    quick = start(__doc__)
    rounds = 5 if quick else 21
    model = one_layer_model()
    result = Result(
        "append_cpu",
        "Append of one token to one layer",
        "4 KV heads of 128, bf16, batch 1; us per token: DynamicLayer.update median (least), "
        f"PiKVCache (`update` and `finish`) median (least) over {PAGE} appends with one page sealed"
        f"; {rounds} interleaved rounds, 1 thread, process CPU time",
        ["cached tokens", "DynamicLayer us", "PiKVCache us", "cheaper"],
    )
    ours: dict[int, Timing] = {}
    for tokens in (4096, 16384, 65536):
        steps = {
            "stock": appends(DynamicCache(config=model.config), tokens, 1),
            "ours": appends(PiKVCache(model), tokens, PAGE),
        }
        times = interleaved(steps, rounds)
        stock, ours[tokens] = times["stock"], times["ours"]
        cheaper = stock.median / (ours[tokens].median / PAGE)
        stock_us = f"{1e3 * stock.median:.0f} ({1e3 * stock.least:.0f})"
        ours_us = f"{1e3 * ours[tokens].median / PAGE:.1f} ({1e3 * ours[tokens].least / PAGE:.1f})"
        result.add(tokens, stock_us, ours_us, f"{cheaper:.0f}x")
        if tokens in GOALS:
            result.goal(
                f"{tokens} tokens: >= {GOALS[tokens]:.0f}x", cheaper, cheaper >= GOALS[tokens]
            )
    growth = ours[65536].median / ours[4096].median
    result.add("64k / 4k", "", f"{growth:.2f}x", "")
    result.goal(f"own cost at 64k <= {FLAT_GOAL}x that at 4k", growth, growth <= FLAT_GOAL)
    result.publish(quick)


if __name__ == "__main__":
    main()
