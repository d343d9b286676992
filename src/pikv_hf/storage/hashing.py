"""A hash of whole numbers, for choices at random that depend on nothing else."""

import torch
from torch import Tensor

# The finaliser of MurmurHash3 for 64 bits, as signed numbers.
MULTIPLIERS = (-49064778989728563, -4265267296055464877)


def hashed(numbers: Tensor) -> Tensor:
    """Return a whole float64 in [-2**52, 2**52) for each of the int64 `numbers`."""
    for multiplier in MULTIPLIERS:
        numbers = (numbers ^ (numbers >> 33)) * multiplier
    return (numbers >> 11).double()


def short_seed(seed: int) -> int:
    """Return `seed`, in [0, 2**63), if it is below 2**31, else a hash of it that is."""
    return seed if seed < 2**31 else int(hashed(torch.tensor(seed))) % 2**31
