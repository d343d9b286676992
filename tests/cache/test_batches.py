"""Whole models: a row of a padded batch generates the logits that it generates alone."""

import itertools

import pytest
import torch
from helpers import FAMILIES, SMALL, exact_model, forward, generate, tiny
from test_combinations import OTHERS, SINGLE, UNCALIBRATED
from tolerances import LOGITS
from zoo import prompt

from pikv_hf import PiKVCache

LENGTHS = (41, 33, 24)
ARCHITECTURES = [*FAMILIES, "qwen3_moe", "olmoe", "jamba", "dbrx"]
METHODS = [
    {},
    {"router": "all"},
    *({"compressor": OTHERS.get(name, name)} for name in UNCALIBRATED),
    *(
        {"scheduler": name, "budget": budget, "hold_prompt": name == "kvzip"}
        for name, budget in zip(SINGLE, itertools.cycle((20, 0.5)), strict=False)
    ),
]
# Of all cases, so many may differ: those in which a code or the choice of an expert is a tie.
MAX_TIES = 1 / 60


def test_a_row_alone() -> None:
    """On eight architectures, a quarter of the methods on each."""
    ties, count = [], 0
    for number, name in enumerate(ARCHITECTURES):
        model = tiny(name)
        inputs = prompt(model, LENGTHS)
        for methods in METHODS[number % 4 :: 4]:
            batch = generate(model, inputs, PiKVCache(model, **methods, **SMALL))
            for row, length in enumerate(LENGTHS):
                alone = {key: tensor[row : row + 1, -length:] for key, tensor in inputs.items()}
                expected = generate(model, alone, PiKVCache(model, **methods, **SMALL))
                count += 1
                error = float((batch.logits[:, row] - expected.logits[:, 0]).abs().max())
                if not error <= LOGITS:
                    ties.append((name, methods, row, error))
    assert len(ties) <= count * MAX_TIES, ties
    assert all(error < 0.01 for *_, error in ties), ties


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    "methods",
    [
        {},
        {"compressor": "int8"},
        {"scheduler": "snapkv", "budget": 24},
        {"scheduler": "h2o", "budget": 0.5, "compressor": "int4"},
        {"scheduler": "adakv", "budget": 24},
    ],
    ids=str,
)
def test_a_second_turn(name, methods) -> None:
    """Its padding is in the middle of the text. In float64 no code is a tie."""
    model = exact_model(name)
    first, second = prompt(model, LENGTHS), prompt(model, (9, 5, 12), seed=1)
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    cache, width = PiKVCache(model, **methods, **SMALL), max(LENGTHS)
    forward(model, ids[:, :width], mask[:, :width], cache)
    batch = generate(model, {"input_ids": ids, "attention_mask": mask}, cache)
    for row, length in enumerate(LENGTHS):
        text = ids[row : row + 1, mask[row].bool()]
        cache = PiKVCache(model, **methods, **SMALL)
        forward(model, text[:, :length], torch.ones_like(text[:, :length]), cache)
        alone = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        expected = generate(model, alone, cache)
        assert (batch.logits[:, row] - expected.logits[:, 0]).abs().max() <= LOGITS
