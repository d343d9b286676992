"""Run by test_kv_device_map.py in a process of its own: maps over four logical devices.

Argument: the seed of random maps.
"""

import random
import sys

import fakegpu
import pytest
import torch

from pikv_hf.placements.kv_device_map import device_of_layers

LAYERS, EXPERTS = 12, 8


def gpu(index: int) -> torch.device:
    return torch.device("fakegpu", index)


def check_examples() -> None:
    given = {
        "": "cpu",
        "layers": 3,
        "layers.0-7": "fakegpu:0",
        "model.layers.4-5": torch.device("fakegpu:1"),
        "layers.5": "fakegpu:2",
        "layers.4-5.experts.0-3": 2,
        "layers.5.experts.0-3": 3,
        "layers.5.experts.1": "cpu",
    }
    found = device_of_layers(given, range(LAYERS), dict.fromkeys(range(LAYERS), EXPERTS))
    own = [found[layer].device for layer in range(LAYERS)]
    assert own == [*[gpu(0)] * 4, gpu(1), gpu(2), *[gpu(0)] * 2, *[gpu(3)] * 4]
    assert found[4].of_experts == (*[gpu(2)] * 4, *[gpu(1)] * 4)
    cpu = torch.device("cpu")
    assert found[5].of_experts == (gpu(3), cpu, gpu(3), gpu(3), *[gpu(2)] * 4)
    assert all(found[layer].of_experts is None for layer in range(LAYERS) if layer not in (4, 5))
    assert device_of_layers({"": "fakegpu"}, [0], {0: None})[0].device == gpu(0)


def check_refusals() -> None:
    experts = dict.fromkeys(range(LAYERS), EXPERTS)
    for given, message in (
        ({"layers.0-3": 0, "layers.3-6": 1}, "equally specific and give layer 3 different devices"),
        (
            {"": 0, "layers.0.experts.0-7": 1, "layers.0-7.experts.0": 2},
            "equally specific and give layer 0 different devices",
        ),
        ({"": "fakegpu:4"}, "it must be a device that is here: .'fakegpu:0', 'fakegpu:1'"),
        ({"": 4}, "is 4; it must be a device that is here"),
        ({"": "cuda:0"}, "is 'cuda:0'; it must be a device that is here"),
    ):
        with pytest.raises(ValueError, match=message):
            device_of_layers(given, [0, 3], experts)
    same = {"layers.0-3": 1, "layers.3-6": 1}
    assert device_of_layers(same, [3], experts)[3].device == gpu(1)


def check_random(seed: int) -> None:
    """Nested ranges, beside a search for the narrowest range that has the layer and the expert."""
    draw = random.Random(seed)
    for _ in range(50):
        layers = nested(draw, LAYERS)
        experts = nested(draw, EXPERTS)
        given: dict[str, int] = {"": draw.randrange(4)}
        given |= {f"layers.{a}-{b}": draw.randrange(4) for a, b in layers}
        first, last = layers[-1]
        given |= {f"layers.{first}-{last}.experts.{a}-{b}": draw.randrange(4) for a, b in experts}
        items = [*given.items()]
        draw.shuffle(items)
        sizes = dict.fromkeys(range(LAYERS), EXPERTS)
        found = device_of_layers(dict(items), range(LAYERS), sizes)
        for layer in range(LAYERS):
            own = [f"layers.{a}-{b}" for a, b in layers if a <= layer <= b]
            device = given[own[-1] if own else ""]
            assert found[layer].device == gpu(device)
            if not first <= layer <= last:
                assert found[layer].of_experts is None
                continue
            keys = [[(a, b) for a, b in experts if a <= expert <= b] for expert in range(EXPERTS)]
            prefix = f"layers.{first}-{last}.experts."
            expected = [given[f"{prefix}{k[-1][0]}-{k[-1][1]}"] if k else device for k in keys]
            assert found[layer].of_experts == tuple(map(gpu, expected))


def nested(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """Ranges of 0 to `count` - 1, each inside of the one before and narrower."""
    first, last = 0, count - 1
    ranges = []
    while first < last:
        if draw.random() < 0.5:
            first += 1
        else:
            last -= 1
        if draw.random() < 0.5 or first == last:
            ranges.append((first, last))
    return ranges


assert fakegpu.DEVICE_COUNT == 4
check_examples()
check_refusals()
check_random(int(sys.argv[1]))
