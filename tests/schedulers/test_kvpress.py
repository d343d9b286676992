"""Who stays: what kvpress keeps, as `scripts/compare_kvpress.py --write-fixture` recorded it."""

import pytest
from compare_kvpress import FIXTURE, GOAL, load, ours, overlaps
from kvpress_cases import ROWS, SMALL

from pikv_hf import SCHEDULERS

SAME = [row for row in ROWS if not row.differs and row.method in SCHEDULERS]


@pytest.mark.parametrize("row", SAME, ids=lambda row: row.name)
def test_the_same_tokens_stay(row) -> None:
    recorded, _ = load(FIXTURE)
    theirs = recorded[row.name].bool()
    old = theirs[..., : SMALL.length - row.window]
    assert 0 < old.sum() < old.numel(), "nothing is chosen"
    mine = ours(SMALL.model("sdpa"), SMALL, row, theirs)
    assert overlaps(mine, theirs, row.window).min() >= GOAL
