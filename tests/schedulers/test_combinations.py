"""Schedulers together with compressors: attention reads exactly what pages give back of what stayed."""

import pytest
import torch
from helpers import BUDGETED, dynamic, forward, paged, spans_of, tail_length, tiny
from test_schedulers import kept
from tolerances import SUMS
from transformers import PreTrainedModel
from zoo import prompt

from pikv_hf import COMPRESSORS, SCHEDULERS, PiKVCache
from pikv_hf.compressors import Compressor, Svd
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import Scheduler

# All but the one that works across layers only.
SINGLE = [name for name in BUDGETED if name != "fastv"]
UNCALIBRATED = [name for name, method in COMPRESSORS.items() if not method.needs_calibration]
OTHERS = {"svd": Svd(rank=2)}  # the default exceeds the head dim
# Each with another, twice.
PAIRS = {
    (SINGLE[i % len(SINGLE)], UNCALIBRATED[(i + shift) % len(UNCALIBRATED)])
    for i in range(max(len(SINGLE), len(UNCALIBRATED)))
    for shift in (0, 3)
}


@pytest.mark.parametrize(("scheduler", "compressor"), sorted(PAIRS))
def test_attention_reads_what_was_kept(scheduler, compressor) -> None:
    assert_reads_what_was_kept(*(OTHERS.get(name, name) for name in (scheduler, compressor)))


def one_layer() -> PreTrainedModel:
    return tiny("mixtral", num_hidden_layers=1, head_dim=16)


def assert_reads_what_was_kept(
    scheduler: str | Scheduler, compressor: str | Compressor | None
) -> bool:
    """Steps of a model of one layer, beside a full cache that hides from each head what it dropped,
    and holds what is left as the pages give it back. Returns whether heads kept different numbers.
    """
    model = one_layer()
    inputs = prompt(model, (60, 52))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 4, "window": 5, "budget": 20, "compressor": compressor}
    options["hold_prompt"] = scheduler == "kvzip"
    cache, full = PiKVCache(model, scheduler=scheduler, **options), dynamic(model)
    for each in (cache, full):
        forward(model, ids[:, :40], mask[:, :40], each)
    cache.compress()
    differ, dropped = False, 0
    for end in range(41, 61):
        sets = [kept(cache, row)[0] for row in range(2)]
        differ |= len({len(head) for row in sets for head in row}) > 1
        copy_pages(paged(cache)[0], full.layers[0])
        opened = range(end - 1 - tail_length(paged(cache)[0]), end)
        dropped += len(opened) + len(sets[0][0]) < end
        visible = torch.tensor(
            [[[at in head or at in opened for at in range(end)] for head in row] for row in sets]
        )
        groups = model.config.num_attention_heads // visible.shape[1]
        hidden = ~visible.repeat_interleave(groups, dim=1)[:, :, None]
        least = torch.finfo(torch.float32).min
        expected = model(
            ids[:, end - 1 : end],
            attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, least),
            position_ids=mask[:, :end].sum(-1, keepdim=True) - 1,
            **with_cache(full),
        ).logits
        actual = forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
        assert (actual - expected).abs().max() <= SUMS * expected.abs().max(), end
    assert dropped == 20
    return differ


def copy_pages(layer, full) -> None:
    """Write the decoded tokens of the pages over those of a full cache."""
    for row in range(2):
        for span in spans_of(layer, [row]):
            valid = span.all_valid()["valid"].expand(span["keys"].shape[:3])
            at = span["positions"].expand(valid.shape)[valid].long()
            head = torch.arange(valid.shape[1])[:, None].expand(valid.shape[1:])[valid[0]]
            full.keys[row, head, at] = span["keys"][valid]
            full.values[row, head, at] = span["values"][valid]


def test_every_method_is_in_a_pair() -> None:
    assert {name for name, _ in PAIRS} == set(SINGLE) <= set(SCHEDULERS)
    assert {name for _, name in PAIRS} == set(UNCALIBRATED)
