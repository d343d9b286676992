"""Peak memory while a long context is cached, against its payload: the bytes of K and V alone.

Each measurement runs in a process of its own; the peak is the kernel's VmHWM less what was resident
before. What is written comes from buffers made before, so that the peak is the cache's own. In the
last rows a model writes it in its forward passes, and the peak contains all that they need. Blocks
of the size of a chunk's K, freed between small ones that stay, then leave holes that glibc does not
use again, whatever the cache; MALLOC_MMAP_THRESHOLD_ prevents them and costs time.
"""

import functools
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Result, random_states, start
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.attention.function import attend
from pikv_hf.compressors import Compressor
from pikv_hf.fitting.calibrate import calibrate
from pikv_hf.fitting.calibration_job import Job
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.loss_guard import LossWarning
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.model.versions import with_cache

LAYERS, SHAPE, DTYPE = 12, (4, 128, 128), torch.bfloat16
QUERY_HEADS, SCALE = 32, 128**-0.5
RUNS = 3
DECODED, DECODED_BY_DYNAMIC = 256, 8  # DynamicCache copies 1.6 GB per token
LIMIT = 1.03
ONE_LAYER = 1 / LAYERS
DYNAMIC, OURS = "DynamicCache", "PiKVCache"


class Case(NamedTuple):
    """Tokens in all and at a time, and whether a model writes them.

    From `threshold` bytes on glibc gives a block its own mapping; its default rises to 32 MB as
    blocks are freed.
    """

    tokens: int
    chunk: int
    by_model: bool = False
    threshold: int | None = None


LONG = {"64k at once": Case(65536, 65536), "64k in chunks of 2048": Case(65536, 2048)}
ALL = "16k, at once or in chunks of 2048"
EACH = (Case(16384, 16384), Case(16384, 2048))
BY_MODEL = {
    "a model, 16k in chunks of 1024": Case(16384, 1024, True),
    "the same, mmap threshold 256 KB": Case(16384, 1024, True, 2**18),
}


class Seen(NamedTuple):
    """Peak while prefilling, bytes held then, and peak while decoding, each over the payload."""

    prefill: float
    held: float
    decode: float

    @property
    def of_allowed(self) -> float:
        """The higher peak, over what is held and one layer in full precision."""
        return max(self.prefill, self.decode) / (self.held + ONE_LAYER)


def geometry_model() -> Qwen3MoeForCausalLM:
    """A small model whose cache has 12 layers of the geometry of Qwen3-30B-A3B: always the same."""
    torch.manual_seed(0)
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


def append(cache: Any, keys: Tensor, values: Tensor, query: Tensor, attends: bool) -> None:
    """One forward's worth of writes: each layer gets `keys`, `values` and sees the newest queries."""
    for layer in cache.layers:
        layer.update(keys, values)
        if isinstance(layer, PagedLayer):
            assert take_layer() is layer
            if attends:
                attend(layer.state, None, query, None, SCALE)  # ty: ignore[invalid-argument-type]
            if layer.state.observed.limit:
                layer.observe(query, SCALE)
            layer.finish()
    if isinstance(cache, PiKVCache):
        cache.end_forward(None)


def forward(model: Qwen3MoeForCausalLM, cache: Any, tokens: int) -> None:
    model(torch.zeros(1, tokens, dtype=torch.int64), **with_cache(cache), logits_to_keep=1)


def compressor_of(name: str, calibration: Path) -> Compressor:
    kind = COMPRESSORS[name]
    return kind(calibration=calibration) if kind.needs_calibration else kind()


def measure(kind: str, case: Case, calibration: Path) -> Seen:
    """`kind`: DYNAMIC, or the name of a compressor."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore", LossWarning)
    model = geometry_model()

    def make() -> Any:
        if kind == DYNAMIC:
            return DynamicCache(config=model.config)
        return PiKVCache(model, compressor=compressor_of(kind, calibration))

    made = {count: random_states(0, count, SHAPE, DTYPE) for count in (1, 256, case.chunk)}
    queries = random_states(1, 32, (QUERY_HEADS, *SHAPE[1:]), DTYPE)[0]

    def write_some(cache: Any, count: int, attends: bool = False) -> None:
        if case.by_model:
            forward(model, cache, count)
        else:
            append(cache, *made[count], queries[:, :, -count:], attends)

    warm = make()  # first calls load code
    for count in (256, 256, 1):
        write_some(warm, count, attends=count == 1)
    cache, per_token = make(), LAYERS * sum(SHAPE[1:]) * SHAPE[0] * DTYPE.itemsize
    reset_peak()
    before = status("VmRSS")
    for _ in range(0, case.tokens, case.chunk):
        write_some(cache, case.chunk)
    payload = case.tokens * per_token
    prefill, held = (status("VmHWM") - before) / payload, held_bytes(cache) / payload
    reset_peak()
    decoded = DECODED_BY_DYNAMIC if kind == DYNAMIC else DECODED
    for number in range(decoded):
        write_some(cache, 1, attends=number % 64 == 0)
    payload += decoded * per_token
    return Seen(prefill, held, (status("VmHWM") - before) / payload)


def isolated(kind: str, case: Case, calibration: Path) -> Seen:
    """`measure` in a process of its own."""
    if case.threshold is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(case.threshold)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen = pool.apply(measure, (kind, case, calibration))
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    return seen


def worst(runs: Sequence[Seen]) -> Seen:
    return Seen(*map(max, zip(*runs, strict=True)))


def calibrated(folder: Path) -> Path:
    """A calibration of the model, to a little random text: sizes are those of any other."""
    job = Job(length=64, windows=2, steps=0)
    generator = torch.Generator().manual_seed(0)
    pieces = (torch.randint(64, (1, job.piece_tokens), generator=generator) for _ in range(4))
    calibrate(geometry_model(), pieces, folder / "calibration.safetensors", job)
    return folder / "calibration.safetensors"


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "memory_cpu",
        "Peak memory over payload",
        f"{LAYERS} layers, 4 KV heads of 128, bf16, batch 1; decoded tokens: {DECODED}, every 64th "
        f"with attention of {QUERY_HEADS} heads, with DynamicCache {DECODED_BY_DYNAMIC} without; "
        f"PiKVCache: the worst of {RUNS} processes, at 16k of one for each way; allowed: what is held "
        "and one layer in bf16; calibrated ones have a quarter of the numbers",
        ["prompt", "cache", "peak in prefill", "bytes held", "peak in decoding", "of allowed"],
    )
    run = functools.partial(isolated, calibration=calibrated(Path(tempfile.mkdtemp())))

    def add(mode: str, name: str, seen: Seen, share: str = "") -> None:
        title = name if name == DYNAMIC else f"{OURS}, {name}"
        result.add(mode, title.removesuffix(", identity"), *(f"{x:.3f}x" for x in seen), share)

    def measure_all(mode: str, kind: str, runs: Sequence[Seen]) -> None:
        seen, share = worst(runs), max(each.of_allowed for each in runs)
        add(mode, kind, seen, f"{100 * share:.0f} %")
        text = f"{mode}, {kind}: peaks <= held + one layer in bf16"
        result.goal(text, share, share <= 1)
        if kind == "identity":
            peak = max(seen.prefill, seen.decode)
            result.goal(f"{mode}, {kind}: peaks <= {LIMIT}x", peak, peak <= LIMIT)

    for mode, case in LONG.items():
        if not quick:
            add(mode, DYNAMIC, run(DYNAMIC, case))
        for kind in ("identity", "int8", "int4"):
            measure_all(mode, kind, [run(kind, case) for _ in range(1 if quick else RUNS)])
    for kind in tqdm(COMPRESSORS):
        measure_all(ALL, kind, [run(kind, case) for case in EACH])
    for mode, case in BY_MODEL.items():
        for kind in ("identity",) if quick else (DYNAMIC, "identity"):
            add(mode, kind, run(kind, case))
    result.publish(quick)


if __name__ == "__main__":
    main()
