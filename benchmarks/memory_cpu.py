"""Peak memory while a long context is cached, against its payload: the bytes of K and V alone.

Each measurement runs in a process of its own; the peak is the kernel's VmHWM less what was resident
before. The peak contains the K and V that the model itself just computed for one layer: 1/12 of the
payload where a prompt is written at once. The goal is on what is beyond them.
"""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from common import Result, random_states, start, write
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache

LAYERS, SHAPE, DTYPE = 12, (4, 128, 128), torch.bfloat16
TOKENS = 65536
# What is written at a time, and from which size on glibc gives a block its own mapping. Its default
# rises to 32 MB as blocks are freed; the heap then keeps holes that no cache asked for.
CASES = [
    ("at once", TOKENS, None),
    ("chunks of 2048", 2048, None),
    ("chunks of 2048, mmap threshold 256 KB", 2048, 2**18),
]
RUNS = 3
DECODED = {"DynamicCache": 8, "PiKVCache": 256}  # DynamicCache copies 1.6 GB per token
LIMIT = 1.03
GOALS = {"own": "peak in prefill, beyond the model's K and V", "decode": "peak in decoding"}


def geometry_model() -> Qwen3MoeForCausalLM:
    """A model whose cache has 12 layers of the geometry of Qwen3-30B-A3B; it is never run."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=SHAPE[0],
        head_dim=SHAPE[1],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    return Qwen3MoeForCausalLM(config).eval()


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


def append(cache: Any, tokens: int, seed: int) -> None:
    """One forward's worth of writes: each layer gets `tokens` tokens."""
    for layer in cache.layers:
        write(layer, *random_states(seed, tokens, SHAPE, DTYPE))


def measure(kind: str, chunk: int) -> dict[str, float]:
    """Peak while prefilling, bytes held then, and peak while decoding, each over the payload."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = geometry_model()
    make = {"DynamicCache": lambda: DynamicCache(config=model.config)}
    make["PiKVCache"] = lambda: PiKVCache(model)
    append(make[kind](), 256, 0)  # first calls load code
    cache, per_token = make[kind](), LAYERS * sum(SHAPE[1:]) * SHAPE[0] * DTYPE.itemsize
    reset_peak()
    before = status("VmRSS")
    for start_token in range(0, TOKENS, chunk):
        append(cache, chunk, start_token)
    payload = TOKENS * per_token
    numbers = {"prefill": (status("VmHWM") - before) / payload, "held": held_bytes(cache) / payload}
    reset_peak()
    for number in range(DECODED[kind]):
        append(cache, 1, number)
    payload += DECODED[kind] * per_token
    return numbers | {"decode": (status("VmHWM") - before) / payload}


def isolated(kind: str, chunk: int, threshold: int | None) -> dict[str, float]:
    """`measure` in a process of its own, whose glibc maps blocks above `threshold` bytes."""
    if threshold is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(threshold)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen = pool.apply(measure, (kind, chunk))
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    return seen


def worst(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "memory_cpu",
        "Peak memory over payload",
        f"{TOKENS} tokens, {LAYERS} layers, 4 KV heads of 128, bf16, batch 1; decoded tokens: "
        + ", ".join(f"{name} {count}" for name, count in DECODED.items())
        + f"; PiKVCache: the worst of {RUNS} processes",
        [
            "prompt",
            "cache",
            "peak in prefill",
            "beyond the model's K and V",
            "bytes held",
            "peak in decoding",
        ],
    )
    for mode, chunk, threshold in CASES:
        for kind in DECODED:
            if quick and kind == "DynamicCache":
                continue
            runs = 1 if quick or kind == "DynamicCache" else RUNS
            seen = worst([isolated(kind, chunk, threshold) for _ in range(runs)])
            seen["own"] = seen["prefill"] - chunk / TOKENS / LAYERS
            names = ("prefill", "own", "held", "decode")
            result.add(mode, kind, *(f"{seen[name]:.3f}x" for name in names))
            if kind == "PiKVCache":
                for name, goal in GOALS.items():
                    result.goal(f"{mode}: {goal} <= {LIMIT}x", seen[name], seen[name] <= LIMIT)
    result.publish(quick)


if __name__ == "__main__":
    main()
