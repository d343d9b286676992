"""Pages of random numbers, and queries, for the tests of `pikv`."""

import pytest
import torch

SEEDS = pytest.mark.parametrize("seed", range(3))


def random_pages(seed: int, is_latent: bool = False, rows=2, heads=2, pages=5):
    """Keys and values [R, H, S, 4, D], the last page a token short, and queries, one of padding."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, heads, pages, 4, 8, generator=generator).double()
    keys[:, :, -1, 3:] = values[:, :, -1, 3:] = 0
    queries = torch.randn(rows, heads, 6, 8, generator=generator).double()
    queries[:, :, 0] = 0
    return keys, (values[..., :0] if is_latent else values), queries
