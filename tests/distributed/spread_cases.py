"""Caches whose pages are dealt to the ranks of a launch; see cases.py."""

import itertools
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from cases import Result, Side, case
from helpers import ONE_ROW, PADDED, SMALL, forward
from torch.distributed.device_mesh import init_device_mesh
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.placements import Experts, Offload, Spread, ranks
from pikv_hf.routers import Hash, TopK

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
MODES = {
    "padded": {},
    "chunks": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
}
METHODS = {
    "int8": {"compressor": "int8"},
    "int4": {"compressor": "int4"},
    "labels": {"scheduler": "expert", "budget": 16},
    "h2o": {"scheduler": "h2o", "budget": 16},
    "adakv": {"scheduler": "adakv", "budget": 16, "compressor": "int8"},
    "hash": {"router": Hash(top_pages=2)},
    "agreement": {"router": TopK(top_pages=2)},
}


def _register(name: str, mode: str = "padded", **options: object) -> None:
    def run(side: Side) -> Result:
        lengths = ONE_ROW if mode == "lookup" else PADDED
        return side.generate(mode=MODES[mode], lengths=lengths, **options)

    run.__name__ = f"spread_{name}"
    case("ep", families=FAMILIES)(run)
    case("ep", ranks=4)(run)


for _mode in MODES:
    _register(_mode, _mode, placement="spread")
for _name, _methods in METHODS.items():
    _register(_name, placement="spread", **_methods)
_register("by_experts", placement=Experts())
_register("by_experts_int8_beams", "beams", placement=Experts(), compressor="int8")
_register("h2o_chunks", "chunks", placement="spread", scheduler="h2o", budget=16)


@case("ep", "plain")
def spread_offloaded(side: Side) -> Result:
    return side.generate(placement=Spread(offload=Offload(device_bytes=2000)), compressor="int8")


@case("plain", ranks=4)
def spread_by_xor(side: Side) -> Result:
    return side.generate(placement="pikv_xor")


@case("plain", ranks=4)
def spread_over_two_nodes(side: Side) -> Result:
    """A mesh of two nodes with two ranks each."""
    if side.ranks == 1:
        return side.generate()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
    return side.generate(process_group=mesh, placement="spread")


@case("plain")
def spread_empty_places(side: Side) -> Result:
    """A prompt shorter than a page, then a page for one of the ranks."""
    mode = {"max_new_tokens": 12}
    return side.generate(placement="spread", lengths=(3, 2), mode=mode, page_size=8)


@case("plain")
def spread_padding_alone(side: Side) -> Result:
    """A chunk of padding alone, before and after pages."""
    ids = prompt(side.model, ONE_ROW)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, :7] = mask[:, 14:20] = 0
    cache, logits = side.cache(placement="spread"), []
    for start, end in itertools.pairwise((0, 7, 14, 20, ids.shape[1])):
        out = forward(side.model, ids[:, start:end], mask[:, :end], cache)
        logits += [] if end in (7, 20) else [out[:, -1]]
    return {"tokens": [], "logits": torch.stack(logits).tolist()}


@case("ep", families=FAMILIES, compare=False)
@case("ep", ranks=4, compare=False)
def traffic(side: Side) -> Result:
    """Messages and bytes of a decode step at two lengths, beside the formula; pages of each rank."""
    found: Result = {}
    for length in (256, 2048):
        cache = PiKVCache(side.model, placement="spread", **SMALL)
        ids = prompt(side.model, (length, length))["input_ids"]
        forward(side.model, ids, torch.ones_like(ids), cache)
        sent: list[int] = []
        gather = ranks._all_gather

        def counted(received, message, group, sent=sent, gather=gather):
            sent.append((received.numel() // message.numel() - 1) * message.nbytes)
            gather(received, message, group=group)

        with mock.patch.object(ranks, "_all_gather", counted):
            mask = torch.ones(2, length + 1, dtype=torch.long)
            forward(side.model, ids[:, :1], mask, cache)
        report = cache.report()
        found[str(length)] = {
            "messages": len(sent),
            "sent": sum(sent),
            "reported": report.places[side.rank].bytes_sent,
            "pages": [place.pages for place in report.places],
            "held": [place.bytes_held for place in report.places],
            "own": sum(slab.nbytes for slab in _own(cache)),
            "layers": sum(layer.paged for layer in report.layers),
        }
    config = side.model.config
    heads = config.num_attention_heads
    dims = (getattr(config, name, None) for name in ("v_head_dim", "head_dim"))
    dim = next(filter(None, dims), config.hidden_size // heads)
    found["formula"] = (side.ranks - 1) * 2 * heads * (dim + 1) * 4
    return found


def _own(cache: PiKVCache) -> Iterator:
    for state in cache.states:
        for slab in state.pages.slabs:
            if not slab.tier.is_remote:
                assert not any(tensor.is_meta for tensor in slab.fields.values())
                yield slab


@case("ep", compare=False)
@case("plain", ranks=4, compare=False)
def balance_by_experts(side: Side) -> Result:
    cache = PiKVCache(side.model, placement="experts", **SMALL)
    ids = prompt(side.model, (4 * 110 * side.ranks,))["input_ids"]
    forward(side.model, ids, torch.ones_like(ids), cache)
    places = cache.report().places
    return {
        "pages": [place.pages for place in places],
        "experts": [sum(place.pages_per_expert or ()) for place in places],
        "imbalance": cache.report().imbalance,
    }


@case("tp", "pp", "dp_ep", "ddp", compare=False)
def spread_refused(side: Side) -> Result:
    return {"refusal": side.refusal(placement="spread")}


@case("plain", compare=False)
def other_arguments(side: Side) -> Result:
    """Ranks with other arguments, one with a wrong one, and one with another model."""
    found = {
        "differ": side.refusal(placement="spread", page_size=4 + side.rank),
        "wrong": side.refusal(placement="spread", window=0 if side.rank else 4),
        "strange": side.refusal(placement="auto", process_group=dist.group.WORLD),
    }
    cache = side.cache(placement="spread")
    found["made"] = str(len(cache.report().places))
    return found


@case("plain", compare=False)
def other_tokens(side: Side) -> Result:
    """Ranks that read other texts notice it when the first page is sealed."""
    cache = side.cache(placement="spread")
    ids = prompt(side.model, ONE_ROW, seed=side.rank)["input_ids"]
    forward(side.model, ids, torch.ones_like(ids), cache)
    try:
        forward(side.model, ids[:, :1], torch.ones(1, ids.shape[1] + 1), cache)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}
