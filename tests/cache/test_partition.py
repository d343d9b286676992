"""Divisions of blocks over devices, beside a search of all of them."""

import itertools
import random

from pikv_hf.cache.partition import SLACK, lacking, partition


def divisions(count: int, parts: int):
    """Ends of all contiguous divisions of `count` blocks."""
    for cuts in itertools.combinations_with_replacement(range(count + 1), parts - 1):
        yield [*cuts, count]


def sums(numbers: list[int], ends: list[int]) -> list[int]:
    return [sum(numbers[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def drawn() -> tuple[list[int], list[int], list[int]]:
    count, devices = random.randint(1, 9), random.randint(1, 4)
    weights = [random.randint(0, 20) for _ in range(count)]
    kv = [random.choice([0, 3, 10]) for _ in range(count)]
    return weights, kv, [random.randint(5, 80) for _ in range(devices)]


def test_lacking_bytes_are_what_each_device_needs_more():
    for _ in range(200):
        weights, kv, limits = drawn()
        total = [a + b for a, b in zip(weights, kv, strict=True)]
        expected = min(
            max(n - limit for n, limit in zip(sums(total, ends), limits, strict=True))
            for ends in divisions(len(total), len(limits))
        )
        assert lacking(total, limits) == max(expected, 0)


def test_fullest_device_and_largest_cache_are_as_small_as_they_can_be():
    checked = 0
    while checked < 200:
        weights, kv, limits = drawn()
        total = [a + b for a, b in zip(weights, kv, strict=True)]
        if lacking(total, limits):
            continue
        checked += 1

        def fullness(ends, total=total, limits=limits):
            return max(n / limit for n, limit in zip(sums(total, ends), limits, strict=True))

        every = [*divisions(len(total), len(limits))]
        bound = min(SLACK * min(map(fullness, every)), 1)
        ends = partition(weights, kv, limits)
        assert fullness(ends) <= bound
        allowed = [other for other in every if fullness(other) <= bound]
        assert max(sums(kv, ends)) == min(max(sums(kv, other)) for other in allowed)


def test_equal_blocks_are_dealt_equally():
    for devices in range(1, 9):
        ends = partition([7] * 24, [5] * 24, [1000] * devices)
        parts = sums([1] * 24, ends)
        assert max(parts) - min(parts) <= 1
