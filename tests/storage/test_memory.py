"""Memory that is asked for: its shape, its owner, and what is large enough for huge pages."""

import pytest
import torch

from pikv_hf.storage.memory import LARGE, empty_like, own


@pytest.mark.parametrize("numbers", [0, 3, LARGE // 4, LARGE // 4 + 1234])
def test_empty_like(numbers) -> None:
    """Large or small, it can be written from end to end."""
    like = torch.zeros(2, 2, dtype=torch.float32)
    new = empty_like(like, (1, numbers))
    assert new.shape == (1, numbers) and new.dtype == like.dtype and new.is_contiguous()
    assert new.untyped_storage().nbytes() == 4 * numbers
    assert (new.fill_(3) == 3).all()


def test_own() -> None:
    """What is dense and alone stays; a view, or one in another order, becomes so."""
    whole = torch.randn(6, LARGE // 16)
    assert own(whole) is whole
    for view in (whole[2:4], whole.t(), whole[:, 1:]):
        mine = own(view)
        assert torch.equal(mine, view) and mine.is_contiguous()
        assert mine.untyped_storage().nbytes() == 4 * view.numel()
