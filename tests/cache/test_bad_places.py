"""Arguments that name places: what is refused, and the sentence that says what is accepted."""

import copy
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, Generated, assert_same, forward, generate, sealed, tiny
from helpers import paged as paged_layers
from on_one_cpu import OnOneCpu
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.cache import site as cache_site
from pikv_hf.cache.site import site_of
from pikv_hf.model.parallel import Parallelism
from pikv_hf.placements import DeviceMap, Experts, Offload, PiKVXor, Spread
from pikv_hf.placements.ranks import Ranks

SHARDING = [Spread, Experts, PiKVXor]
OBJECT = SimpleNamespace()
MAP = {"": "cpu"}

# Options of a placement that deals pages, the error, and parts of its sentence.
BAD_DEVICES = [
    ({"devices": ["cuda:97"]}, ValueError, "`devices` has 'cuda:97', which this process does not"),
    ({"devices": ["banana"]}, ValueError, "`devices` has 'banana', which this process does not"),
    ({"devices": 97}, ValueError, "`devices` has 97, which this process does not have"),
    ({"devices": ["cpu", "cpu"]}, ValueError, "`devices` is ['cpu', 'cpu']; each device must be"),
    ({"devices": ["cpu", "cpu:0"]}, ValueError, "each device must be named once"),
    ({"devices": []}, ValueError, "`devices` is empty; it must name devices"),
    ({"devices": 3.5}, TypeError, "`devices` is 3.5; it must be a list of devices"),
    ({"devices": [None]}, TypeError, "`devices` has None; it must have devices, such as"),
    ({"devices": [True]}, TypeError, "`devices` has True; it must have devices, such as"),
    ({"devices": ["cpu", "meta"]}, ValueError, "`devices` has 'meta', which holds no data"),
    ({"devices": "cpu", "process_group": OBJECT}, ValueError, "`devices` and `process_group` are"),
    ({"offload": "ram"}, TypeError, "`offload` is 'ram'; it must be an Offload or None"),
    ({"offload": 100}, TypeError, "`offload` is 100; it must be an Offload or None"),
    (
        {"offload": Offload(device_bytes=100, residency="lru")},
        ValueError,
        "whose `residency` keeps copies for one device: leave it out",
    ),
]


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text.count("`") >= 2, text
    return text


@pytest.mark.parametrize("method", SHARDING)
@pytest.mark.parametrize("options, error, match", BAD_DEVICES, ids=lambda x: str(x)[:40])
def test_devices_and_offload(method, options, error, match) -> None:
    with pytest.raises(error, match=re.escape(match)) as caught:
        method(**options)
    one_sentence(caught.value)


@pytest.mark.parametrize("factor", [0, 0.99, -1, float("nan"), float("inf"), "1.1", True, None])
def test_capacity(factor) -> None:
    expected = re.escape(f"`capacity_factor` is {factor!r}; it must be a number in [1, inf)")
    with pytest.raises((TypeError, ValueError), match=expected):
        Experts(capacity_factor=factor)


BAD_MAPS = [
    ({"kv_device_map": "cpu"}, TypeError, "`kv_device_map` is a str; it must be a mapping"),
    ({"kv_device_map": ["cpu"]}, TypeError, "`kv_device_map` is a list; it must be a mapping"),
    ({"max_memory": 5}, TypeError, "`max_memory` is 5; it must be a mapping of devices to bytes"),
    ({"max_memory": ["cpu"]}, TypeError, "`max_memory` is ['cpu']; it must be a mapping"),
    (
        {"max_memory": {"cpu": "x"}},
        ValueError,
        "`max_memory['cpu']` is 'x'; it must be a number of",
    ),
    ({"max_memory": {"cpu": -1}}, ValueError, "`max_memory['cpu']` is -1; it must be a number of"),
    ({"max_memory": {"cpu": True}}, ValueError, "`max_memory['cpu']` is True; it must be a number"),
    ({"devices": "cpu"}, ValueError, "leave out `devices`, `process_group` and `offload`"),
    ({"process_group": OBJECT}, ValueError, "leave out `devices`, `process_group` and `offload`"),
    ({"offload": Offload()}, ValueError, "leave out `devices`, `process_group` and `offload`"),
]


@pytest.mark.parametrize("options, error, match", BAD_MAPS, ids=lambda x: str(x)[:40])
def test_device_maps(options, error, match) -> None:
    with pytest.raises(error, match=re.escape(match)) as caught:
        DeviceMap(**({"kv_device_map": MAP} | options))
    one_sentence(caught.value)


NOTHING = "there is nothing to spread over: the attention of the model runs on cpu in one process"
# Arguments of a cache of a model with two layers on the CPU.
BAD_CACHES = [
    ({"placement": "spread"}, ValueError, NOTHING),
    ({"placement": "experts"}, ValueError, NOTHING),
    ({"placement": "pikv_xor"}, ValueError, NOTHING),
    ({"placement": Spread(devices=["cpu"])}, ValueError, NOTHING),
    (
        {"process_group": 3},
        TypeError,
        "`process_group` is 3; it must be a ProcessGroup or a DeviceM",
    ),
    ({"process_group": 3, "placement": "local"}, ValueError, "but `placement` is Local(), which"),
    ({"process_group": 3, "placement": "offload"}, ValueError, "but `placement` is Offload("),
    (
        {"process_group": 3, "placement": Spread(process_group=4)},
        ValueError,
        "or has a group of its own: use 'spread', 'experts' or 'pikv_xor'",
    ),
    (
        {"process_group": 3, "placement": Spread(devices=["cpu"])},
        ValueError,
        "`devices` and `process_group` are given: give one of them",
    ),
    ({"kv_device_map": MAP, "placement": "spread"}, ValueError, "each names the places of pages"),
    ({"kv_device_map": MAP, "placement": "offload"}, ValueError, "each names the places of pages"),
    ({"kv_device_map": MAP, "process_group": 3}, ValueError, "each names the places of pages"),
    ({"kv_device_map": {}}, ValueError, "which give no device to the layers [0, 1]: add keys"),
    ({"kv_device_map": {"layers.0": "cpu"}}, ValueError, "no device to the layers [1]: add keys"),
    ({"kv_device_map": 5}, TypeError, "`kv_device_map` is a int; it must be a mapping"),
    ({"kv_device_map": {3: "cpu"}}, ValueError, "has the key 3; a key must be"),
    (
        {"kv_device_map": {"": "cuda:97"}},
        ValueError,
        "is 'cuda:97'; it must be a device that is he",
    ),
    (
        {"kv_device_map": MAP | {"layers.0.experts.99": "cpu"}},
        ValueError,
        "the experts of layer 0 are 0 to 7",
    ),
    (
        {"placement": DeviceMap(kv_device_map=MAP, max_memory={"cuda:97": 5})},
        ValueError,
        "`max_memory` has 'cuda:97', which this process does not have",
    ),
    (
        {"placement": DeviceMap(kv_device_map=MAP, max_memory={"disk": 5})},
        ValueError,
        "`max_memory` has 'disk', which this process does not have",
    ),
    (
        {"placement": DeviceMap(kv_device_map=MAP, max_memory={1.5: 5})},
        TypeError,
        "`max_memory` has 1.5; it must have devices",
    ),
]


@pytest.mark.parametrize("options, error, match", BAD_CACHES, ids=lambda x: str(x)[:50])
def test_caches(options, error, match) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    with pytest.raises(error, match=re.escape(match)) as caught:
        PiKVCache(model, **options)
    one_sentence(caught.value)
    assert "generate" not in vars(model), "the model is left as it was"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_max_memory_of_a_device_without_pages(monkeypatch) -> None:
    """A limit of a device that the map does not name would have no effect."""
    method = DeviceMap(kv_device_map=MAP, max_memory={"cpu": 5})
    assert method.site([0], {0: None}).devices == (torch.device("cpu"),)
    other = torch.device("cuda", 1)
    monkeypatch.setattr(
        "pikv_hf.placements.device_map.checked_devices", lambda devices, name: (other,)
    )
    match = re.escape("`max_memory` has 'cpu', but `kv_device_map` keeps pages on ['cpu']")
    with pytest.raises(ValueError, match=match):
        method.site([0], {0: None})


@pytest.mark.parametrize("option", ["placement", "process_group", "kv_device_map"])
def test_places_need_a_model(option) -> None:
    value = {"placement": "spread", "process_group": OBJECT, "kv_device_map": MAP}[option]
    with pytest.raises(ValueError, match=f"`{option}` needs an attached cache: pass the model"):
        PiKVCache(config=tiny("mixtral").config, **{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "experts"},
        {"placement": "pikv_xor"},
        {"kv_device_map": MAP | {"layers.0.experts.1": "cpu"}},
    ],
    ids=str,
)
def test_experts_of_a_dense_model(options) -> None:
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"`placement` is .*needs the gates of an MoE model; Llama"
    ):
        PiKVCache(model, **options)
    PiKVCache(model, kv_device_map=MAP)


@pytest.mark.parametrize("count", [3, 5, 6, 7, 12])
def test_pikv_xor_needs_a_power_of_two(count, monkeypatch) -> None:
    PiKVXor().check(1 << count)
    devices = tuple(torch.device("cuda", n) for n in range(count))
    monkeypatch.setattr(cache_site, "layer_devices", lambda *_: dict(enumerate(devices)))
    monkeypatch.setattr(cache_site, "checked_devices", tuple)
    binding = SimpleNamespace(attention={})
    match = (
        rf"`placement` is PiKVXor.*a power of two of places, but there are {count}: use 'spread'"
    )
    with pytest.raises(ValueError, match=match):
        site_of(PiKVXor(), None, binding, Parallelism())
    assert site_of(Spread(), None, binding, Parallelism()).count == count


def test_a_group_of_one_rank(monkeypatch) -> None:
    alone = SimpleNamespace(rank=0, size=1)
    monkeypatch.setattr(cache_site, "ranks_of", lambda *_: alone)
    with pytest.raises(ValueError, match="nothing to spread over: `process_group` has one rank"):
        site_of(Spread(), None, SimpleNamespace(attention={}), Parallelism())


# ---- copies -------------------------------------------------------------------------------------

DEALT = [OnOneCpu(2), OnOneCpu(3, Experts()), DeviceMap(kv_device_map=MAP)]


def filled(placement) -> tuple[PiKVCache, Generated]:
    model = tiny("mixtral", num_hidden_layers=2)
    cache = PiKVCache(model, placement=placement, **SMALL)
    return cache, generate(model, prompt(model, (30, 20)), cache)


@pytest.mark.parametrize("placement", DEALT, ids=["spread", "experts", "map"])
@pytest.mark.parametrize("way", ["fork", "deepcopy", "pickle"])
def test_copies_hold_the_same_and_go_on(placement, way) -> None:
    cache, _ = filled(placement)
    ways = {
        "fork": PiKVCache.fork,
        "deepcopy": copy.deepcopy,
        "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    }
    new = ways[way](cache)
    if way == "pickle":
        new.attach(tiny("mixtral", num_hidden_layers=2))
    for first, second in zip(paged_layers(new), paged_layers(cache), strict=True):
        for row in range(2):
            assert sealed(first, row) == sealed(second, row)
    ids, mask = torch.randint(3, 99, (2, 6)), torch.ones(2, cache.get_seq_length() + 6)
    mask[1, :10] = 0
    model = tiny("mixtral", num_hidden_layers=2)
    logits = [forward(model, ids, mask, each) for each in (new, cache)]
    results = [Generated(ids, each) for each in logits]
    assert_same(*results)


def test_a_cache_over_ranks_is_copied_but_not_pickled() -> None:
    ranks = object.__new__(Ranks)
    assert copy.deepcopy(ranks) is ranks
    message = re.escape("a PiKVCache that ranks share cannot be pickled: each holds a part of it")
    cache, _ = filled(OnOneCpu(2))
    places = cache.states[0].pages.places
    site = copy.copy(places.site)
    object.__setattr__(site, "exchange", ranks)
    object.__setattr__(places, "site", site)
    with pytest.raises(TypeError, match=message):
        pickle.dumps(cache)
