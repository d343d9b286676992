"""A budget in bytes is kept whatever the pages are: their size, encoding, dtype, heads and copies."""

import pytest
import torch
from helpers import chunks, forward, tiny
from zoo import prompt

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.compressors import Int4, MixedCompressor, Svd, ThinK
from pikv_hf.schedulers import AdaKV, KeyDiff

PLAIN = {
    name: make()
    for name, make in COMPRESSORS.items()
    if not (make.needs_calibration or issubclass(make, MixedCompressor))
}
PLAIN |= {"int4, channels": Int4(key_axis="channel"), "svd of 16": Svd(rank=16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [8, 64, 256])
@pytest.mark.parametrize("name", PLAIN)
def test_bytes_per_token(name, page_size, dtype) -> None:
    """Of a full page as it is encoded, with what is stored once for all of its tokens."""
    compressor = PLAIN[name]
    keys, values = torch.randn(2, 1, 1, 2, page_size, 64).to(dtype)
    fields = compressor.encode(keys, values)
    measured = sum(tensor.nbytes for tensor in fields.values()) / (2 * page_size)
    assert measured == compressor.bytes_per_token(64, 64, dtype.itemsize, page_size)


@pytest.mark.parametrize(
    ("name", "dtype", "scheduler", "compressor", "page_size"),
    [
        ("mixtral", torch.float32, KeyDiff(), Svd(rank=8), 8),
        ("mixtral", torch.bfloat16, KeyDiff(), Int4(key_axis="channel"), 4),
        ("mixtral", torch.bfloat16, AdaKV(KeyDiff()), "pyramid", 16),
        ("qwen3_next", torch.float32, AdaKV(KeyDiff()), "fp8", 4),
        ("deepseek_v3", torch.bfloat16, KeyDiff(), ThinK(), 8),
        ("gpt_oss", torch.float32, KeyDiff(), "pikv", 32),
        ("mixtral", torch.float32, KeyDiff(), None, 64),
    ],
    ids=str,
)
def test_never_exceeded(name, dtype, scheduler, compressor, page_size) -> None:
    """After a prompt, each generated token, and in a fork, which cannot use the room that is shared."""
    model = tiny(name, max_position_embeddings=2048, dtype=dtype)
    inputs = prompt(model, (520, 470))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    full = PiKVCache(model)
    forward(model, ids[:, :500], mask[:, :500], full)
    options = {"compressor": compressor, "page_size": page_size, "window": 8, "router": "all"}
    limit = full.nbytes // 2
    cache = PiKVCache(model, scheduler=scheduler, budget=f"{limit}B", **options)
    used = []
    for start, end in chunks(520, 500):
        forward(model, ids[:, start:end], mask[:, :end], cache)
        used.append(cache.nbytes)
        if end == 510:
            cache = cache.fork()
    assert max(used) <= limit
    assert min(used) >= 0.6 * limit
