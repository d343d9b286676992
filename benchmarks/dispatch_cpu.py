"""Short contexts: what a decode step costs beside the attention itself, in CPU time and operators.

48 layers as in Qwen3-30B-A3B, but tiny widths: nearly all time is Python and operator dispatch.
Experts run as `batched_mm`, the cheapest of transformers' implementations, so that the model's own
part is as small as it gets.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import Result, fill, interleaved, start
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

LAYERS = 48
SHAPE = (2, 16, 16)
SHORT = (64, 256)
RATIO_GOAL, OPS_GOAL = 1.10, 2.0


class CountOps(TorchDispatchMode):
    """Counts the operators that compute something; views are nearly free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def tiny_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa")
    model.set_experts_implementation("batched_mm")
    return model.eval()


def filled(model: Qwen3MoeForCausalLM, cache: Any, tokens: int) -> Callable[[], torch.Tensor]:
    """A decode step of `model` on `cache` with `tokens` tokens in it."""
    if isinstance(cache, PiKVCache) and cache.settings.router is not None:
        model(input_ids=torch.randint(256, (1, tokens)), **with_cache(cache))
    else:
        fill(cache, tokens, SHAPE, torch.float32)
    token = torch.tensor([[7]])
    return lambda: model(input_ids=token, **with_cache(cache)).logits


def operators(step: Callable[[], object]) -> float:
    """Operators of one step, per layer."""
    with CountOps() as count:
        step()
    return sum(count.counts.values()) / LAYERS


def main() -> None:
    quick = start(__doc__)
    rounds = 11 if quick else 101
    result = Result(
        "dispatch_cpu",
        "Dispatch cost of a decode step at short context",
        "48 layers, hidden 64, 4 query and 2 KV heads of 16, 2 of 8 experts (batched_mm), fp32, "
        f"median (least) of {rounds} interleaved rounds, 1 thread, process CPU time",
        ["cached tokens", "cache", "ms/step", "vs DynamicCache", "operators/layer"],
    )
    for tokens in (*SHORT, 1024):
        # An attached model slows other caches a little, too: each cache gets a model of its own.
        stock, ours, labelled = tiny_model(), tiny_model(), tiny_model()
        steps = {
            "DynamicCache": filled(stock, DynamicCache(config=stock.config), tokens),
            "PiKVCache": filled(ours, PiKVCache(ours), tokens),
            "PiKVCache, router='all'": filled(labelled, PiKVCache(labelled, router="all"), tokens),
        }
        ops = {name: operators(step) for name, step in steps.items()}
        times = interleaved(steps, rounds)
        base = times["DynamicCache"]
        for name, time in times.items():
            ratio = time.median / base.median
            shown = f"{time.median:.1f} ({time.least:.1f})"
            result.add(tokens, name, shown, f"{ratio:.3f}x", f"{ops[name]:.1f}")
        if tokens not in SHORT:
            continue
        ratio = times["PiKVCache"].median / base.median
        added = ops["PiKVCache"] - ops["DynamicCache"]
        result.goal(f"{tokens} tokens: CPU time <= {RATIO_GOAL}x", ratio, ratio <= RATIO_GOAL)
        result.goal(f"{tokens} tokens: <= +{OPS_GOAL} operators/layer", added, added <= OPS_GOAL)
    result.publish(quick)


if __name__ == "__main__":
    main()
