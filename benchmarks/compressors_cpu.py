"""What each compressor costs: bytes of a sealed element, error of attention, time of a decode step.

A step is the append of one token and attention over all of them, in one layer. transformers'
QuantizedCache stands beside them, with the backends that are installed (`pip install -e .[bench]`);
a --quick run leaves it out (the first use of quanto compiles C++).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from append_cpu import DTYPE, SHAPE, one_layer_model
from common import Result, Timing, fill, interleaved, random_states, start
from peers import GROUP, Peer, quantized_bytes
from sealed import attention, encoded_bytes, seal
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.attention.function import attend
from pikv_hf.compressors import Compressor, Fp8, Int2, Int4, Int8
from pikv_hf.layer.handoff import take_layer
from pikv_hf.layer.loss_guard import LossWarning
from pikv_hf.storage.page_table import PageTable

HEADS, DIM = SHAPE[:2]
GROUPS, PAGE, SCALE = 8, 64, SHAPE[1] ** -0.5
OBSERVED = 32 * GROUPS  # queries of the newest 32 tokens, for the compressors that ask
LENGTHS = (16384, 65536)
PEERS = [Peer("quanto", 4), Peer("hqq", 4), Peer("fp8", 8)]
OWN = ", transformers' attention"
TIME_GOALS = {"int8": 1.1, "int4": 2.0}
FASTER_GOALS = {
    "int8": {"quanto": 2.5, "hqq": 2.5, "fp8": 15.0},
    "int4": {"quanto": 1.5, "hqq": 1.5},
}
BYTE_GOALS = {"int8": 1.04, "int4": 0.54, "int2": 0.30, "fp8": 1.04}

# Options whose error and bytes explain the defaults; KIVI: zeros, keys per channel, not rotated.
KIVI = {"symmetric": False, "key_axis": "channel", "rotate": False}
OPTIONS: dict[str, Compressor] = {
    "int8, rotated": Int8(rotate=True),
    "int4, not rotated": Int4(rotate=False),
    "int4, asymmetric": Int4(symmetric=False),
    "int4, groups of 64": Int4(group_size=64),
    "int4, channel": Int4(key_axis="channel"),
    "int4, as KIVI": Int4(**KIVI),
    "int2, not rotated": Int2(rotate=False),
    "int2, channel": Int2(key_axis="channel"),
    "int2, as KIVI": Int2(**KIVI),
    "fp8, e5m2": Fp8(format="e5m2"),
}


class Inputs(NamedTuple):
    """Query [1, H, G, D]; keys, values [1, H, T, D]; other queries [1, H, Q, D], seen before."""

    query: Tensor
    keys: Tensor
    values: Tensor
    observed: Tensor


def inputs(kind: str, tokens: int = 4096) -> Inputs:
    keys, values = random_states(0, tokens, SHAPE, DTYPE)
    query, observed = (random_states(1, n, SHAPE, DTYPE)[0] for n in (GROUPS, OBSERVED))
    if kind == "outlier":  # as trained models have them: large keys, small queries
        keys[..., 5::32] *= 10
        query[..., 5::32] *= 0.3
        observed[..., 5::32] *= 0.3
    return Inputs(query, keys, values, observed)


def exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query.double() @ keys.double().mT * SCALE
    return scores.softmax(-1) @ values.double()


def attention_error(compressor: Compressor, kind: str) -> float:
    """Relative error of the attention output in bf16, against float64 on what was given."""
    given = inputs(kind)
    out = attention(sealed(compressor, given), given.query, SCALE)
    return relative(out, exact(given.query, given.keys, given.values))


def sealed(compressor: Compressor, given: Inputs) -> PageTable:
    return seal(compressor, PAGE, given.keys, given.values, given.observed * SCALE)


def peer_costs(config: PreTrainedConfig, peer: Peer) -> list[str]:
    """Bytes of an element, and the same errors of what a peer gives back, in float64 from there."""
    shown = []
    for kind in ("gaussian", "outlier"):
        query, keys, values, _ = inputs(kind)
        layer = peer.cache(config).layers[0]
        layer.update(keys, values)
        size = quantized_bytes(layer) / 2 / keys.numel()
        held = layer.update(keys[:, :, :0], values[:, :, :0])
        shown.append(f"{relative(exact(query, *held), exact(query, keys, values)):.4f}")
    return [f"{size:.4f}", *shown]


def relative(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def bytes_per_element(compressor: Compressor) -> float:
    """Of the encoded pages of 4,096 tokens: tensors, not a formula."""
    return encoded_bytes(sealed(compressor, inputs("gaussian"))) / (2 * PAGE * DIM)


def step_of(model: Any, compressor: Compressor, tokens: int) -> Callable[[], Tensor]:
    """Append one token and attend to all, in a layer that holds `tokens` tokens."""
    cache = fill(PiKVCache(model, compressor=compressor), tokens, SHAPE, DTYPE)
    new = random_states(99, 1, SHAPE, DTYPE)
    query = random_states(98, 1, (HEADS * GROUPS, DIM, DIM), DTYPE)[0]

    def step() -> Tensor:
        layer = cache.layers[0]  # which needs its cache
        layer.update(*new)
        assert take_layer() is layer
        out = attend(layer.state, model, query, None, SCALE)
        layer.finish()
        return out

    return step


def peer_steps(model: Any, peer: Peer, tokens: int) -> dict[str, Callable[[], object]]:
    """`update` of transformers' layer, and attention over what it returns: packed, and its own."""
    layer = peer.cache(model.config).layers[0]
    layer.update(*random_states(0, tokens, SHAPE, DTYPE))
    new = random_states(99, 1, SHAPE, DTYPE)
    packed = random_states(98, GROUPS, SHAPE, DTYPE)[0]
    query = packed.reshape(1, HEADS * GROUPS, 1, DIM)
    module = model.model.layers[0].self_attn
    return {
        peer.title: lambda: F.scaled_dot_product_attention(packed, *layer.update(*new)),
        peer.title + OWN: lambda: sdpa_attention_forward(
            module, query, *layer.update(*new), None, scaling=SCALE
        ),
    }


def uncalibrated() -> dict[str, Compressor]:
    """The methods that need no data of a model, as they come."""
    return {name: kind() for name, kind in COMPRESSORS.items() if not kind.needs_calibration}


def add_time_goals(result: Result, tokens: int, times: dict[str, Timing]) -> None:
    for name, bound in TIME_GOALS.items():
        ratio = times[name].median / times["identity"].median
        text = f"{name}, {tokens} tokens: <= {bound}x the time of identity"
        result.goal(text, ratio, ratio <= bound)
    for name, bounds in FASTER_GOALS.items():
        for peer in (peer for peer in PEERS if peer.title in times and peer.backend in bounds):
            for way in ("", OWN):
                bound = bounds[peer.backend]
                ratio = times[peer.title + way].median / times[name].median
                text = f"{name}, {tokens} tokens: >= {bound}x faster than {peer.name}{way}"
                result.goal(text, ratio, ratio >= bound)


def main() -> None:
    quick = start(__doc__)
    warnings.simplefilter("ignore", LossWarning)
    peers = [] if quick else [peer for peer in PEERS if peer.version]
    rounds = {16384: 5, 65536: 3} if quick else {16384: 25, 65536: 11}
    methods = uncalibrated()
    shown = " and ".join(map(str, rounds.values()))
    result = Result(
        "compressors_cpu",
        "Compressors: bytes, error and time of a decode step",
        f"one layer, {HEADS} KV and {HEADS * GROUPS} query heads of {DIM}, bf16, pages of {PAGE}; error: "
        "of the attention output over 4,096 tokens, relative, against float64, Gaussian keys or 4 of "
        f"{DIM} key channels x 10; ms: append and attention, median (least) of {shown} "
        "interleaved rounds, 1 thread, process CPU time; quanto, hqq and transformers: its "
        f"QuantizedCache (version of the package that quantizes), groups of {GROUP}, attention by sdpa "
        "with the queries of a KV head packed, or as transformers calls sdpa; that quanto and hqq "
        "quantize everything anew once in 128 tokens is not in the median; think, pyramid and pikv "
        "have seen the queries of 32 other tokens, not so in the timed steps",
        ["compressor", "bytes/element", "error", "error, outliers"]
        + [text for tokens in LENGTHS for text in (f"ms at {tokens // 1024}k", "x identity")],
    )
    model = one_layer_model()
    cells: dict[str, list[str]] = defaultdict(list)
    for tokens in LENGTHS:
        steps: dict[str, Callable[[], object]] = {
            name: step_of(model, method, tokens) for name, method in methods.items()
        }
        for peer in peers:
            steps |= peer_steps(model, peer, tokens)
        times = interleaved(steps, rounds[tokens])
        for name, time in times.items():
            ratio = time.median / times["identity"].median
            cells[name] += [f"{time.median:.2f} ({time.least:.2f})", f"{ratio:.2f}"]
        add_time_goals(result, tokens, times)
    for name, method in [*methods.items(), *OPTIONS.items()]:
        size = bytes_per_element(method)
        errors = [f"{attention_error(method, kind):.4f}" for kind in ("gaussian", "outlier")]
        result.add(name, f"{size:.4f}", *errors, *cells.get(name, [""] * 4))
        if name in BYTE_GOALS:
            bound = BYTE_GOALS[name]
            result.goal(f"{name}: <= {bound} bytes an element", size, size <= bound)
    for peer in [] if quick else PEERS:
        costs = peer_costs(model.config, peer) if peer in peers else [""] * 3
        result.add(peer.title, *costs, *cells.get(peer.title, [""] * 4))
        if peer in peers:
            result.add(peer.title + OWN, *[""] * 3, *cells[peer.title + OWN])
    result.publish(quick)


if __name__ == "__main__":
    main()
