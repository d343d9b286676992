"""Decoding with multi-head latent attention: DeepSeek-V3 against DynamicCache with sdpa and eager.

transformers expands every cached latent to 128 heads of keys and values at each step; PiKVCache
moves that projection to the query (absorption). Attention has the widths of DeepSeek-V3, experts
are few and small.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import Result, fill, interleaved, start
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

LAYERS, RANK, ROPE = 2, 512, 64
GOALS = {2048: 3.0, 8192: 3.0}
LOGITS_GOAL = 1e-5


def random_model(dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=1024,
        hidden_size=7168,
        num_hidden_layers=LAYERS,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROPE,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=0,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


def decode_step(model: Any, cache: Any, tokens: int) -> Callable[[], Tensor]:
    """A decode step of `model` on `cache`, which then holds `tokens` random latents."""
    fill(cache, tokens, (1, RANK, ROPE), model.dtype)
    token = torch.tensor([[7]])
    return lambda: model(input_ids=token, **with_cache(cache)).logits


def main() -> None:
    quick = start(__doc__)
    rounds = 3 if quick else 11
    result = Result(
        "mla_cpu",
        "Decode with latent attention (MLA): DynamicCache against PiKVCache",
        f"DeepSeek-V3 attention ({LAYERS} layers, hidden 7168, 128 heads, ranks 1536 and {RANK}, "
        f"rotary {ROPE}), 2 of 8 experts of 128, bf16 (logits: fp32), batch 1, median (least) of "
        f"{rounds} interleaved rounds, 1 thread, process CPU time",
        ["cached tokens", "cache", "ms/step", "PiKVCache faster", "fp32 logits differ, relative"],
    )
    lengths = [2048] if quick else list(GOALS)
    differences = {tokens: logits_difference(tokens) for tokens in lengths}
    stock = random_model(torch.bfloat16)
    ours, eager = copy.deepcopy(stock), copy.deepcopy(stock)
    eager.set_attn_implementation("eager")
    for tokens in lengths:
        steps = {
            "DynamicCache, sdpa": decode_step(stock, DynamicCache(config=stock.config), tokens),
            "DynamicCache, eager": decode_step(eager, DynamicCache(config=stock.config), tokens),
            "PiKVCache": decode_step(ours, PiKVCache(ours), tokens),
        }
        times = interleaved(steps, rounds, warmup=1)
        for name, time in times.items():
            faster = time.median / times["PiKVCache"].median
            differ = f"{differences[tokens]:.1e}" if name == "PiKVCache" else ""
            shown = f"{time.median:.1f} ({time.least:.1f})"
            result.add(tokens, name, shown, f"{faster:.1f}x", differ)
        faster = times["DynamicCache, sdpa"].median / times["PiKVCache"].median
        result.goal(f"{tokens} tokens: >= {GOALS[tokens]}x sdpa", faster, faster >= GOALS[tokens])
        met = differences[tokens] <= LOGITS_GOAL
        goal = f"{tokens} tokens: fp32 logits within {LOGITS_GOAL} of the largest"
        result.goal(goal, differences[tokens], met)
    result.publish(quick)


def logits_difference(tokens: int) -> float:
    """Largest difference of the fp32 logits of one step to stock sdpa, over the largest logit."""
    stock = random_model(torch.float32)
    expected = decode_step(stock, DynamicCache(config=stock.config), tokens)()
    difference = expected - decode_step(stock, PiKVCache(stock), tokens)()
    return (difference.abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    main()
