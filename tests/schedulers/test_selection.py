"""The best of many tokens against a stable sort, and their rows against `gather`."""

import pytest
import torch
from torch import Tensor

from pikv_hf.schedulers.top_tokens import best_of_each_head, best_places
from pikv_hf.storage.gather import taken

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def oracle(scores: Tensor, count: int) -> Tensor:
    """A stable sort from the newest to the oldest: of equal ones the later."""
    newest_first = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (scores.shape[-1] - 1 - newest_first[..., :count]).sort(dim=-1).values


def all_kinds(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scores [2, 3, length]: all different, with ties, equal, with infinities."""
    generator = torch.Generator().manual_seed(length)
    ties = torch.randint(0, 4, (2, 3, length), generator=generator)
    infinite = ties.double().masked_fill(ties == 0, -torch.inf).masked_fill(ties == 3, torch.inf)
    kinds = {
        "different": torch.rand(2, 3, length, generator=generator),
        "ties": ties,
        "equal": torch.full((2, 3, length), -1.5),
        "infinite": infinite,
        "all lowest": torch.full((2, 3, length), -torch.inf),
    }
    return {name: scores.to(dtype) for name, scores in kinds.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_best_places(length, dtype) -> None:
    """Any count, also none, all and more than there are."""
    for name, scores in all_kinds(length, dtype).items():
        for count in {0, 1, length // 2, length - 1, length, length + 5}:
            found = best_places(scores, count)
            assert torch.equal(found, oracle(scores, count)), (name, count)


@pytest.mark.parametrize("length", [1, 17, 300])
def test_best_of_each_head(length) -> None:
    """Each row has a count of its own, filled up with -1."""
    counts = torch.tensor([[0, 1, length // 2], [length, length - 1, 0]])
    for name, scores in all_kinds(length, torch.float32).items():
        found = best_of_each_head(scores, counts)
        assert found.shape == (2, 3, length)
        for row in range(2):
            for head in range(3):
                count = int(counts[row, head])
                expected = oracle(scores[row, head], count)
                assert torch.equal(found[row, head, :count], expected), (name, count)
                assert (found[row, head, count:] == -1).all()
    assert best_of_each_head(scores, torch.zeros_like(counts)).shape == (2, 3, 0)


def test_nan_stays() -> None:
    """As with a sort, so that a lossless cache keeps it and the right number of tokens."""
    scores = torch.tensor([[1.0, torch.nan, 3.0, torch.nan, 2.0]])
    assert best_places(scores, 3).tolist() == [[1, 2, 3]]
    assert best_places(scores.fill_(torch.nan), 2).tolist() == [[3, 4]]


def layouts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors of `shape` [2, 3, T, D] as models and pages leave them."""
    rows, heads, tokens, dim = shape
    numbers = torch.arange(rows * heads * tokens * dim, dtype=torch.float32)
    wide = torch.randn(rows, heads, tokens + 5, dim + 2)
    return {
        "dense": numbers.view(shape),
        "heads behind tokens": numbers.view(rows, tokens, heads, dim).transpose(1, 2),
        "a part of the tokens": wide[:, :, 5:, :dim].contiguous()[:, :, 1:],
        "a part of the dims": wide[:, :, :tokens, 1:-1],
        "dims behind": numbers.view(rows, heads, dim, tokens).transpose(2, 3),
        "the same in all heads": numbers.view(shape)[:, :1],
        "the same in all rows": numbers.view(shape)[:1],
    }


@pytest.mark.parametrize("dim", [1, 4])
def test_taken(dim) -> None:
    for name, tensor in layouts((2, 3, 11, dim)).items():
        scores = torch.rand(2, 3, tensor.shape[2])
        keep = best_places(scores, 6)
        full = tensor.expand(2, 3, *tensor.shape[2:])
        expected = full.gather(2, keep[..., None].expand(*keep.shape, dim))
        assert torch.equal(taken(tensor, keep), expected), name


def test_taken_of_any_width() -> None:
    """Positions have no dim, experts one that is not the head dim, latents values of none."""
    keep = torch.tensor([[[0, 2], [1, 2]]])
    positions = torch.arange(3).view(1, 1, 3)
    assert torch.equal(taken(positions, keep), keep)
    pages = torch.randn(1, 2, 3, 4, 5)
    assert torch.equal(taken(pages, keep)[0, 1], pages[0, 1, 1:])
    assert taken(torch.empty(1, 2, 3, 0), keep).shape == (1, 2, 2, 0)
    assert taken(pages, keep[..., :0]).shape == (1, 2, 0, 4, 5)
