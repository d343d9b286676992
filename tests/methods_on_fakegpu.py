"""Run by test_placement.py in a process of its own: methods on a logical device.

Arguments: names of schedulers and compressors; none = each of both.
"""

import itertools
import sys

import fakecuda  # noqa: F401 - first: before any model is built
import fakegpu
import torch
from accelerate import dispatch_model
from helpers import BUDGETED, SMALL
from zoo import build, prompt

from pikv_hf import COMPRESSORS, SCHEDULERS, PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import FastV

UNCALIBRATED = [name for name, method in COMPRESSORS.items() if not method.needs_calibration]
LEFT_PADDED, NEW_TOKENS = (30, 21), 4


def cases(names: list[str]) -> list[dict]:
    """Each scheduler with a compressor, each compressor without a scheduler."""
    schedulers = [name for name in names if name in SCHEDULERS]
    pairs = zip(schedulers, itertools.cycle(("identity", "int4")), strict=False)
    budgeted = [
        {
            "scheduler": FastV(1) if scheduler == "fastv" else scheduler,
            "budget": 12,
            "compressor": compressor,
            "hold_prompt": scheduler == "kvzip",
        }
        for scheduler, compressor in pairs
    ]
    return budgeted + [{"compressor": name} for name in names if name in COMPRESSORS]


def tokens(model, inputs, methods):
    cache = PiKVCache(model, **methods, **SMALL)
    return model.generate(**inputs, **with_cache(cache), max_new_tokens=NEW_TOKENS).cpu()


def main(*names: str) -> None:
    torch.set_num_threads(1)
    chosen = cases(list(names) or [*BUDGETED, *UNCALIBRATED])
    assert chosen
    model = build("qwen3_moe", num_hidden_layers=1 if names else 2)
    model.set_experts_implementation("eager")
    inputs = prompt(model, LEFT_PADDED)
    expected = [tokens(model, inputs, methods) for methods in chosen]
    places = {name: "fakegpu:0" for name, _ in model.named_children()}
    model = dispatch_model(model, places, main_device="fakegpu:0", force_hooks=True)
    inputs = {key: value.to("fakegpu:0") for key, value in inputs.items()}
    for methods, reference in zip(chosen, expected, strict=True):
        fakegpu.reset()
        assert torch.equal(tokens(model, inputs, methods), reference), methods
        assert fakegpu.DISPATCHED["fakegpu:0"]


main(*sys.argv[1:])
