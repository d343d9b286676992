"""Pages on disk against pages in memory: one decode step, and where the bytes are.

The model is the "wide" one of decode_cpu: a step reads 4 layers of real weights beside its pages.
"warm": the files are still in the system's page cache, as when memory is free. "cold": the system
was made to give them up before every step, as when other programs need the memory, so that the disk
reads every page at every step; with and without announcing the next layer's files. These steps are
timed by the clock, as who waits for a disk takes no CPU time: they depend on what else is running.
"""

import ctypes
import dataclasses
import gc
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Result, start
from decode_cpu import DIM, KV_HEADS, LAYERS, decode_step, random_model
from torch import Tensor

from pikv_hf import PiKVCache
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.placements import Local, Offload, Placement
from pikv_hf.storage.tiers import Disk

PAGEOUT = 21  # MADV_PAGEOUT of Linux: write back and give up
CASES = [(None, 8192), (None, 32768), ("int4", 32768)]
WARM_GOAL = 1.1


@dataclasses.dataclass(frozen=True)
class Unannounced(Offload):
    """No file is read ahead, but by the system."""

    @property
    def reads_ahead(self) -> bool:
        return False


def files_of(cache: PiKVCache) -> list[Tensor]:
    return [
        tensor
        for layer in cache.layers
        if isinstance(layer, PagedLayer)
        for slab in layer.state.pages.slabs
        if isinstance(slab.tier, Disk)
        for tensor in slab.fields.values()
        if tensor.numel()
    ]


def give_up(tensors: list[Tensor]) -> None:
    """Let the system forget the files behind `tensors`, written to disk before.

    Raises:
        RuntimeError: it keeps some of them.
    """
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        place = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        libc.msync(*place, 4)
        libc.madvise(*place, PAGEOUT)
        pages = (ctypes.c_ubyte * -(-tensor.nbytes // mmap.PAGESIZE))()
        libc.mincore(*place, pages)
        kept = sum(page & 1 for page in pages) / len(pages)
        if kept > 0.05:
            raise RuntimeError(f"the system keeps {kept:.0%} of a file in memory")


def clocked(
    steps: dict[str, Callable[[], Any]], before: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each step, in CPU time and by the clock, the first round not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            before[name]()
            begin = time.process_time(), time.perf_counter()
            step()
            end = time.process_time(), time.perf_counter()
            if number:
                seconds[name].append((end[0] - begin[0], end[1] - begin[1]))
    cpu, clock = (
        {
            name: 1e3 * statistics.median(pair[i] for pair in pairs)
            for name, pairs in seconds.items()
        }
        for i in range(2)
    )
    return cpu, clock


def measured(
    compressor: str | None, tokens: int, folder: str, rounds: int
) -> tuple[tuple[dict[str, float], dict[str, float]], dict[str, dict[str, int]], float]:
    """Times of a step, CPU and clock, and bytes by tier, for each way; and how far the logits of whole layers on disk differ."""
    half = LAYERS * KV_HEADS * DIM * tokens * 2 // (1 if compressor is None else 4)
    ways: dict[str, tuple[Placement, bool]] = {
        "near": (Local(), False),
        "half": (Offload(half, 0, folder), False),
        "warm": (Offload(0, 0, folder), False),
        "cold": (Offload(0, 0, folder), True),
        "unannounced": (Unannounced(0, 0, folder), True),
    }
    steps, before, tiers = {}, {}, {}
    for name, (placement, is_cold) in ways.items():
        model = random_model("wide", torch.bfloat16)
        cache = PiKVCache(model, placement=placement, compressor=compressor)
        steps[name] = decode_step(model, cache, tokens, torch.bfloat16)
        before[name] = (lambda c=cache: give_up(files_of(c))) if is_cold else lambda: None
        tiers[name] = cache.report().tiers
    logits = {name: step() for name, step in steps.items()}
    whole = [logits[name] for name in ("warm", "cold", "unannounced")]
    differ = max((other - logits["near"]).abs().max().item() for other in whole)
    times = clocked(steps, before, rounds)
    return times, tiers, differ


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f}"


def main() -> None:
    quick = start(__doc__)
    rounds = 3 if quick else 9
    result = Result(
        "offload_cpu",
        "Pages on disk against pages in memory: one decode step",
        f"{LAYERS}-layer Qwen3-MoE of decode_cpu (wide), bf16, batch 1, median of {rounds} rounds in "
        "turn, 1 thread, process CPU time, cold ones by the clock; MiB: sealed pages in memory / on "
        "disk; cold: the page cache is emptied of them before every step",
        [
            "compressor",
            "cached tokens",
            "in memory ms",
            "half on disk, MiB",
            "ms",
            "all on disk, MiB",
            "warm ms",
            "clock: in memory ms",
            "cold ms",
            "not announced ms",
        ],
    )
    for compressor, tokens in CASES[: 1 if quick else 3]:
        with tempfile.TemporaryDirectory() as folder:
            times, tiers, differ = measured(compressor, tokens, folder, rounds)
            gc.collect()
        shown = [f"{mib(tiers[n]['device'])} / {mib(tiers[n]['disk'])}" for n in ("half", "warm")]
        cpu, clock = (
            {k: f"{ms:.1f} ({ms / t['near']:.2f}x)" for k, ms in t.items()} for t in times
        )
        cells = (times[0]["near"], shown[0], cpu["half"], shown[1], cpu["warm"], times[1]["near"])
        result.add(compressor or "identity", tokens, *cells, clock["cold"], clock["unannounced"])
        case = f"{compressor or 'identity'}, {tokens} tokens"
        warm = times[0]["warm"] / times[0]["near"]
        result.goal(f"{case}: warm <= {WARM_GOAL}x", warm, warm <= WARM_GOAL)
        result.goal(f"{case}: logits of pages on disk differ by 0", differ, differ == 0)
    result.publish(quick)


if __name__ == "__main__":
    main()
