"""Decoding with a long context: one step of a whole Qwen3-MoE model against DynamicCache and sdpa.

Attention is that of Qwen3-30B-A3B. "narrow" has small hidden and expert widths, so that a step is
mostly its KV cache, as in deep contexts; "wide" has the real widths (8 experts of 768 per token),
so that a step also reads 4 layers of real weights, which no cache can make cheaper. "masked" is
DynamicCache given a mask that hides nothing: transformers then packs the queries, as it could always.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import Result, fill, interleaved, start
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

LAYERS, KV_HEADS, DIM = 4, 4, 128
WIDTHS = {
    "narrow": {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts_per_tok": 2},
    "wide": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
}
GOALS = {2048: 3.5, 8192: 6.0, 32768: 10.0}
LOGITS_GOAL = 1e-5


def random_model(width: str, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        num_experts=8,
        **WIDTHS[width],
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def decode_step(model: Any, cache: Any, tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A decode step of `model` on `cache`, which then holds `tokens` random tokens."""
    fill(cache, tokens, (KV_HEADS, DIM, DIM), dtype)
    token = torch.tensor([[7]])
    return lambda: model(input_ids=token, **with_cache(cache)).logits


def packed_step(model: Any, cache: Any, tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The same with a mask that hides nothing: it makes sdpa pack the queries of one KV head."""
    fill(cache, tokens, (KV_HEADS, DIM, DIM), dtype)
    token = torch.tensor([[7]])

    def step() -> Tensor:
        mask = torch.zeros(1, 1, 1, cache.get_seq_length() + 1, dtype=dtype)
        return model(input_ids=token, attention_mask=mask, **with_cache(cache)).logits

    return step


def steps_of(width: str, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The same step with both caches, each on a model of its own: equal weights, equal contents."""
    stock, ours = random_model(width, dtype), random_model(width, dtype)
    return {
        "DynamicCache": decode_step(stock, DynamicCache(config=stock.config), tokens, dtype),
        "packed": packed_step(stock, DynamicCache(config=stock.config), tokens, dtype),
        "PiKVCache": decode_step(ours, PiKVCache(ours), tokens, dtype),
    }


def logits_difference(tokens: int, count: int = 3) -> tuple[float, float]:
    """Largest difference of fp32 logits over `count` steps, and the largest logit."""
    steps = steps_of("narrow", tokens, torch.float32)
    pairs = [(steps["DynamicCache"](), steps["PiKVCache"]()) for _ in range(count)]
    difference = max((a - b).abs().max().item() for a, b in pairs)
    return difference, max(a.abs().max().item() for a, _ in pairs)


def main() -> None:
    quick = start(__doc__)
    rounds = 5 if quick else 15
    result = Result(
        "decode_cpu",
        "Whole-model decode: DynamicCache + sdpa against PiKVCache",
        f"{LAYERS}-layer Qwen3-MoE, 32 query and {KV_HEADS} KV heads of {DIM}, vocabulary 4096; "
        "narrow: hidden 512, 2 of 8 experts of 256; wide: hidden 2048, 8 of 8 experts of 768; bf16 "
        f"(logits: fp32, narrow), batch 1, median (least) of {rounds} interleaved rounds, 1 thread,"
        " process CPU time",
        [
            "widths",
            "cached tokens",
            "DynamicCache ms",
            "same, masked ms",
            "PiKVCache ms",
            "faster",
            "logits differ",
        ],
    )
    lengths = list(GOALS)[: 2 if quick else 3]
    for width in WIDTHS:
        for tokens in lengths:
            times = interleaved(steps_of(width, tokens, torch.bfloat16), rounds)
            stock, ours = times["DynamicCache"], times["PiKVCache"]
            faster = stock.median / ours.median
            cells = [f"{t.median:.1f} ({t.least:.1f})" for t in times.values()]
            differ = ""
            if width == "narrow":
                difference, largest = logits_difference(tokens)
                differ = f"{difference:.1e} of {largest:.2f}"
                result.goal(
                    f"narrow, {tokens} tokens: >= {GOALS[tokens]}x", faster, faster >= GOALS[tokens]
                )
                met = difference <= LOGITS_GOAL
                result.goal(f"{tokens} tokens: fp32 logits within {LOGITS_GOAL}", difference, met)
            result.add(width, tokens, *cells, f"{faster:.2f}x", differ)
    result.publish(quick)


if __name__ == "__main__":
    main()
