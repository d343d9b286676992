"""What the tests of TurboQuant share: random vectors, all bits, both variants."""

import pytest
import torch
from torch.nn.functional import normalize

# Least mean squared errors of a scalar quantizer of N(0, 1) (Max, 1960); the paper rounds them to
# 0.36, 0.117, 0.03 and 0.009 (after theorem 1). On a sphere of finite dim they are a little less.
GAUSSIAN = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
all_bits = pytest.mark.parametrize("bits", [2, 3, 4])
all_variants = pytest.mark.parametrize("residual", [False, True], ids=["mse", "residual"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def directions(count, dim, seed=0):
    """[1, count, dim] on the unit sphere, float32."""
    return normalize(random(1, count, dim, seed=seed), dim=-1)
