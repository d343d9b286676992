"""Division of a sequence of blocks into contiguous parts, one for each device."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

# The fullest device may be fuller by this factor than it must be, so that the KV is more even.
SLACK = 1.05


def partition(weights: Sequence[int], kv: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Return the ends of the parts of blocks, one part for each limit.

    Block i has `weights[i]` bytes of weights and `kv[i]` bytes of keys and values. Of the divisions
    whose fullest device is at most `SLACK` times as full as in the best one, it is one whose largest
    KV is smallest, and then the most even one.

    The blocks must fit: `lacking` is 0.
    """
    total, kv_sum = _sums([a + b for a, b in zip(weights, kv, strict=True)]), _sums(kv)

    def fullness(start: int, end: int, device: int) -> float:
        share = (total[end] - total[start]) / limits[device]
        return share if share <= 1 else math.inf

    bound = min(SLACK * _best(len(weights), len(limits), fullness, max)[0], 1)

    def kv_bytes(start: int, end: int, device: int) -> float:
        return kv_sum[end] - kv_sum[start] if fullness(start, end, device) <= bound else math.inf

    max_kv = _best(len(weights), len(limits), kv_bytes, max)[0]

    def unevenness(start: int, end: int, device: int) -> float:
        is_even = kv_bytes(start, end, device) <= max_kv
        return fullness(start, end, device) ** 2 if is_even else math.inf

    return _best(len(weights), len(limits), unevenness, lambda a, b: a + b)[1]


def lacking(nbytes: Sequence[int], limits: Sequence[int]) -> int:
    """Return the bytes by which every limit must be raised for blocks of `nbytes` to fit; 0 = none."""
    total = _sums(nbytes)

    def excess(start: int, end: int, device: int) -> float:
        return total[end] - total[start] - limits[device]

    return max(round(_best(len(nbytes), len(limits), excess, max)[0]), 0)


def _best(
    count: int,
    devices: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """Return the least joint cost of a division of `count` blocks, and the ends of its parts."""
    best = [(cost(0, end, 0), [end]) for end in range(count + 1)]
    for device in range(1, devices):
        best = [
            min(
                (
                    (join(best[start][0], cost(start, end, device)), [*best[start][1], end])
                    for start in range(end + 1)
                ),
                key=lambda pair: pair[0],
            )
            for end in range(count + 1)
        ]
    return best[count]


def _sums(numbers: Sequence[int]) -> list[int]:
    """Return the sums of the first 0, 1, ... of `numbers`."""
    return [0, *accumulate(numbers)]
