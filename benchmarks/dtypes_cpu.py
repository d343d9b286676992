"""How near logits in bfloat16 are to float64, with PiKVCache and with DynamicCache.

Tiny random models of the main architectures read a prompt and then one token at a time, with both
caches. The reference is the same weights in float64, without a cache. The caches add up in different
orders, so that their tokens can differ from each other in bfloat16: what counts is that neither is
nearer to float64. (In float32 both give the same tokens, which the tests check.)
"""

import copy
import math
import statistics
import sys
from collections.abc import Callable

import torch
from common import ROOT, Result, start
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache

sys.path.append(str(ROOT / "tests"))
from zoo import build

ARCHITECTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe", "granitemoe", "phimoe", "llama4", "hunyuan_v1_moe", "jamba", "qwen3_next"),
)
CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "PiKVCache": lambda model: PiKVCache(model, page_size=16, window=16),
}
PROMPT, STEPS, ROWS = 96, 64, 4
RATIO_GOAL = 1.05


def logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits [B, STEPS, V] of the tokens behind the prompt, in float64."""
    pieces = ids.split([PROMPT, *[1] * STEPS], dim=1)
    outputs = [model(piece, **with_cache(cache)).logits[:, -1:] for piece in pieces]
    return torch.cat(outputs[1:], dim=1).double()


def errors(name: str, seeds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of each cache: the median error of a token's logits relative to the reference, and the share
    of tokens whose most likely next token is the reference's."""
    found: dict[str, list[Tensor]] = {cache: [] for cache in CACHES}
    right: dict[str, list[Tensor]] = {cache: [] for cache in CACHES}
    for seed in range(seeds):
        model = build(name, "eager", seed=seed)
        model.set_experts_implementation("eager")  # the others have no float64
        model = model.to(torch.bfloat16)
        reference = copy.deepcopy(model).double()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 120, (ROWS, PROMPT + STEPS), generator=generator)
        exact = reference(ids, use_cache=False).logits[:, PROMPT:]
        for cache, make in CACHES.items():
            got = logits(model, ids, make(model))
            found[cache].append(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten())
            right[cache].append((got.argmax(-1) == exact.argmax(-1)).flatten().double())
    return (
        {cache: torch.cat(values).median().item() for cache, values in found.items()},
        {cache: torch.cat(values).mean().item() for cache, values in right.items()},
    )


def main() -> None:
    quick = start(__doc__)
    seeds = 1 if quick else 4
    result = Result(
        "dtypes_cpu",
        "Distance of logits from float64",
        f"bfloat16, tiny random models, prompt {PROMPT}, {STEPS} decode steps, {ROWS} rows, {seeds} seeds; "
        "median relative error of a token's logits; same top token as float64",
        ["architecture", *(f"{c} error" for c in CACHES), "ratio"]
        + [f"{c} top token" for c in CACHES],
    )
    ratios = []
    for name in ARCHITECTURES:
        error, right = errors(name, seeds)
        theirs, ours = error.values()
        ratios.append(ours / theirs)
        shares = (f"{100 * share:.1f} %" for share in right.values())
        result.add(name, theirs, ours, ours / theirs, *shares)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    text = "as near to float64 as DynamicCache, geometric mean over architectures"
    result.goal(f"{text} <= {RATIO_GOAL}", mean, mean <= RATIO_GOAL)
    result.publish(quick)


if __name__ == "__main__":
    main()
