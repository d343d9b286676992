"""Peak memory while a long context is cached, against its payload: the bytes of K and V alone.

Each measurement runs in a process of its own; the peak is the kernel's VmHWM less what was resident
before. What is written comes from buffers made before, so that the peak is the cache's own. In the
last rows a model writes it in its forward passes, and the peak contains all that they need. Blocks
of the size of a chunk's K, freed between small ones that stay, then leave holes that glibc does not
use again, whatever the cache; MALLOC_MMAP_THRESHOLD_ prevents them and costs time.
"""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from common import Result, random_states, start, write
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache

LAYERS, SHAPE, DTYPE = 12, (4, 128, 128), torch.bfloat16
# Tokens in all and at a time, whether a model writes them, and from which size on glibc gives a
# block its own mapping. Its default rises to 32 MB as blocks are freed.
CASES = [
    ("64k at once", 65536, 65536, False, None),
    ("64k in chunks of 2048", 65536, 2048, False, None),
    ("a model, 16k in chunks of 1024", 16384, 1024, True, None),
    ("the same, mmap threshold 256 KB", 16384, 1024, True, 2**18),
]
RUNS = 3
DYNAMIC, COMPRESSED = "DynamicCache", ("int8", "int4")
CACHES = (DYNAMIC, "PiKVCache", *(f"PiKVCache, {name}" for name in COMPRESSED))
DECODED, DECODED_BY_DYNAMIC = 256, 8  # DynamicCache copies 1.6 GB per token
LIMIT = 1.03
ONE_LAYER = 1 / LAYERS
GOALS = {"prefill": "peak in prefill", "decode": "peak in decoding"}


def geometry_model() -> Qwen3MoeForCausalLM:
    """A small model whose cache has 12 layers of the geometry of Qwen3-30B-A3B."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=SHAPE[0],
        num_key_value_heads=SHAPE[0],
        head_dim=SHAPE[1],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    return Qwen3MoeForCausalLM(config).eval().to(DTYPE)


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def held_bytes(cache: Any) -> int:
    if isinstance(cache, PiKVCache):
        return cache.nbytes
    return sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values)
    )


def append(cache: Any, keys: Tensor, values: Tensor) -> None:
    """One forward's worth of writes: each layer gets `keys` and `values`."""
    for layer in cache.layers:
        write(layer, keys, values)
    if isinstance(cache, PiKVCache):
        cache.end_forward(None)


def forward(model: Qwen3MoeForCausalLM, cache: Any, tokens: int) -> None:
    model(torch.zeros(1, tokens, dtype=torch.int64), past_key_values=cache, logits_to_keep=1)


def measure(kind: str, tokens: int, chunk: int, by_model: bool) -> dict[str, float]:
    """Peak while prefilling, bytes held then, and peak while decoding, each over the payload."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = geometry_model()
    compressor = kind.partition(", ")[2] or None

    def make() -> Any:
        if kind == DYNAMIC:
            return DynamicCache(config=model.config)
        return PiKVCache(model, compressor=compressor)

    made = {count: random_states(0, count, SHAPE, DTYPE) for count in (1, 256, chunk)}

    def write_some(cache: Any, count: int) -> None:
        if by_model:
            forward(model, cache, count)
        else:
            append(cache, *made[count])

    warm = make()  # first calls load code
    for count in (256, 256, 1):
        write_some(warm, count)
    cache, per_token = make(), LAYERS * sum(SHAPE[1:]) * SHAPE[0] * DTYPE.itemsize
    reset_peak()
    before = status("VmRSS")
    for _ in range(0, tokens, chunk):
        write_some(cache, chunk)
    payload = tokens * per_token
    numbers = {"prefill": (status("VmHWM") - before) / payload, "held": held_bytes(cache) / payload}
    reset_peak()
    decoded = DECODED_BY_DYNAMIC if kind == DYNAMIC else DECODED
    for _ in range(decoded):
        write_some(cache, 1)
    payload += decoded * per_token
    return numbers | {"decode": (status("VmHWM") - before) / payload}


def isolated(
    kind: str, tokens: int, chunk: int, by_model: bool, threshold: int | None
) -> dict[str, float]:
    """`measure` in a process of its own, whose glibc maps blocks above `threshold` bytes."""
    if threshold is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(threshold)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen = pool.apply(measure, (kind, tokens, chunk, by_model))
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    return seen


def worst(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "memory_cpu",
        "Peak memory over payload",
        f"{LAYERS} layers, 4 KV heads of 128, bf16, batch 1; decoded tokens: "
        f"{DECODED}, with DynamicCache {DECODED_BY_DYNAMIC}"
        f"; PiKVCache: the worst of {RUNS} processes",
        ["prompt", "cache", "peak in prefill", "bytes held", "peak in decoding"],
    )
    for mode, *case, threshold in CASES:
        for kind in CACHES:
            is_compressed = "," in kind
            if (quick and kind == DYNAMIC) or (is_compressed and case[-1]):
                continue
            runs = 1 if quick or kind == DYNAMIC else RUNS
            seen = worst([isolated(kind, *case, threshold) for _ in range(runs)])
            names = ("prefill", "held", "decode")
            result.add(mode, kind, *(f"{seen[name]:.3f}x" for name in names))
            if kind == DYNAMIC or case[-1]:
                continue
            limit = seen["held"] + ONE_LAYER if is_compressed else LIMIT
            what = "held + one layer in bf16" if is_compressed else f"{LIMIT}x"
            for name, goal in GOALS.items():
                result.goal(f"{mode}, {kind}: {goal} <= {what}", seen[name], seen[name] <= limit)
    result.publish(quick)


if __name__ == "__main__":
    main()
