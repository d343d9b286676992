"""The controller of PiKV's "AdaKV": a share of the budget that follows the recall of attention."""

import dataclasses

import pytest
import torch
from helpers import forward, held_by, paged, slabs_of, tiny
from test_schedulers import softmax_of_newest
from tolerances import SUMS
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import AdaKV, Candidates, Knorm, PiKVAdaKV, SnapKV
from pikv_hf.storage.ragged_pages import RaggedPages
from pikv_hf.storage.uniform_pages import UniformPages

BUDGET, SEEN, OPEN = 60, 90, 10


def trace(seed: int, rows: int = 2) -> Candidates:
    """Tokens, and queries that attend to a few of them, of the same kind for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    keys, queries = draw(rows, 2, SEEN, 8), draw(rows, 2, 2, 6, 8)
    positions = torch.arange(SEEN - OPEN).expand(rows, 2, -1)
    old, new = keys.split([SEEN - OPEN, OPEN], dim=2)
    return Candidates(positions, old, old, new, SEEN, 0, queries, 1.5)


def recall(tokens: Candidates, keep: torch.Tensor) -> list[float]:
    """The share of attention that stays, of each row, with a softmax over everything in float64."""
    out = []
    for row in range(len(keep)):
        keys = torch.cat([tokens.keys[row], tokens.open_keys[row]], dim=1)
        attention = softmax_of_newest(tokens.queries[row], keys, tokens.scale, 6).mean((1, 2))
        gone = torch.ones(2, SEEN - OPEN, dtype=torch.bool)
        for head in range(2):
            gone[head, keep[row, head][keep[row, head] >= 0]] = False
        out.append(1 - float((attention[:, : SEEN - OPEN] * gone).sum(1).mean()))
    return out


@pytest.mark.parametrize("target", [0.6, 0.8, 0.9])
def test_converges_to_its_target(target) -> None:
    scheduler = PiKVAdaKV(SnapKV(window_size=6, kernel_size=1), target=target, rate=0.2)
    control, found = torch.zeros(2, 1), []
    for step in range(80):
        tokens = dataclasses.replace(trace(step), row_state=control)
        keep = scheduler.keep(tokens, BUDGET)
        found.append(recall(tokens, keep))
        control = scheduler.next_row_state(tokens, keep)
        held = (keep >= 0).sum(-1)
        assert (held == held[:, :1]).all() and held.max() <= BUDGET
    assert min(found[0]) > target, "the whole budget is enough, there is something to save"
    late = torch.tensor(found[40:]).mean(0)
    assert (late - target).abs().max() < 0.02


def test_a_step_is_the_published_one() -> None:
    scheduler = PiKVAdaKV(SnapKV(window_size=6, kernel_size=1), target=0.7, rate=0.3)
    tokens = dataclasses.replace(trace(0), row_state=torch.tensor([[0.5], [0.0]]))
    keep = scheduler.keep(tokens, BUDGET)
    assert (keep >= 0).sum(-1).tolist() == [[30, 30], [60, 60]]
    theta = [0.5, 1.0]
    expected = [t + 0.3 * (0.7 - r) for t, r in zip(theta, recall(tokens, keep), strict=True)]
    actual = (1 - scheduler.next_row_state(tokens, keep)).flatten().tolist()
    assert actual == pytest.approx([min(t, 1.0) for t in expected], abs=SUMS)


def test_each_row_of_a_cache_has_its_own() -> None:
    """In a padded batch with beams' row changes, as alone; never more than the budget."""
    model = tiny("mixtral")
    lengths = (90, 70)
    inputs = prompt(model, lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    scheduler = PiKVAdaKV(SnapKV(window_size=4), target=0.5, rate=0.5, window_size=4)
    options = {"scheduler": scheduler, "budget": 30, "page_size": 2, "window": 4}

    def read(ids, mask, first):
        cache = PiKVCache(model, **options)
        for start, end in [(0, first), *((at, at + 1) for at in range(first, ids.shape[1]))]:
            forward(model, ids[:, start:end], mask[:, :end], cache)
        return cache

    both = read(ids, mask, 75)
    both.reorder_cache(torch.tensor([1, 0]))
    counts = []
    for row, length in ((1, 90), (0, 70)):
        mine = ids[1 - row : 2 - row, -length:]
        alone = read(mine, torch.ones_like(mine), length - 15)
        for layer, single in zip(paged(both), paged(alone), strict=True):
            assert held_by(layer, row).tolist() == held_by(single, 0).tolist()
            assert torch.allclose(
                layer.state.observed.control[row], single.state.observed.control[0], atol=SUMS
            )
            counts.append(int(held_by(layer, row)[0]))
    assert max(counts) <= 26 and min(counts) < 20


def test_heads_of_one_length_need_no_pool() -> None:
    """Rows keep different numbers of tokens, but the heads of each equally many."""
    model = tiny("mixtral")
    inputs = prompt(model, (120, 60))
    for scheduler, kind in ((PiKVAdaKV(Knorm()), UniformPages), (AdaKV(Knorm()), RaggedPages)):
        cache = PiKVCache(model, scheduler=scheduler, budget=40, page_size=4, window=6, interval=8)
        model.generate(**inputs, **with_cache(cache), max_new_tokens=20, do_sample=False)
        assert {type(slab) for layer in paged(cache) for slab in slabs_of(layer)} == {kind}


def test_bad_arguments() -> None:
    for options in ({"target": 0}, {"target": 1.0}, {"rate": 0}, {"window_size": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
            PiKVAdaKV(**options)
    with pytest.raises(ValueError, match="equally many"):
        PiKVAdaKV(AdaKV())
    assert PiKVAdaKV(Knorm()).needs.queries == 32
