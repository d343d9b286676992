"""What the tests of calibration share: texts, calibrations, and the states they are made of."""

from pathlib import Path

import pytest
import torch
from helpers import dynamic
from torch import Tensor
from transformers import PreTrainedModel
from zoo import prompt

from pikv_hf.fitting.calibrate import calibrate
from pikv_hf.fitting.calibration_job import METHODS, Job
from pikv_hf.model.versions import with_cache
from pikv_hf.needles.haystack import make_haystack

TINY = Job(length=40, windows=4, steps=4)
KINDS = pytest.mark.parametrize("kind", METHODS.values(), ids=str)
FAMILIES = pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])


def pieces_of(model: PreTrainedModel, count: int, job: Job = TINY, seed: int = 5) -> list[Tensor]:
    ids = prompt(model, (count * job.piece_tokens,), seed=seed)["input_ids"]
    return [*ids.split(job.piece_tokens, dim=1)]


def made(model: PreTrainedModel, folder: Path, job: Job = TINY, count: int = 6) -> Path:
    path = folder / "cal.safetensors"
    calibrate(model, pieces_of(model, count, job), path, job)
    return path


def cached_states(
    model: PreTrainedModel, piece: Tensor, length: int
) -> list[tuple[Tensor, Tensor]]:
    """What pages hold of the first `length` tokens, by layer, [H, T, D], from transformers' cache."""
    cache = dynamic(model)
    with torch.no_grad():
        model(piece, **with_cache(cache))
    states = [(layer.keys[0, :, :length], layer.values[0, :, :length]) for layer in cache.layers]
    if getattr(model.config, "kv_lora_rank", None):
        return [(torch.cat(pair, dim=-1), pair[0][..., :0]) for pair in states]
    return states


def needle_text(first: int, count: int) -> str:
    stacks = (make_haystack(length=512, needles=8, seed=first + i) for i in range(count))
    return "\n".join(f"{stack.prompt()} {stack.answers[0]} ." for stack in stacks)
