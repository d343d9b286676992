"""What each compressor costs: bytes of a sealed element, error of attention, time of a decode step.

A step is the append of one token and attention over all of them, in one layer. "quanto" is
transformers' QuantizedLayer with optimum-quanto, if that is installed; a --quick run leaves it out
(its first use compiles C++).
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from append_cpu import DTYPE, SHAPE, one_layer_model
from common import Result, fill, interleaved, random_states, start
from torch import Tensor
from transformers.cache_utils import QuantoQuantizedLayer

from pikv_hf import COMPRESSORS, PiKVCache
from pikv_hf.attention import attend
from pikv_hf.compressors import Compressor, Fp8, Int2, Int4, Int8
from pikv_hf.context import take_layer

HEADS, DIM = SHAPE[:2]
GROUPS, PAGE, SCALE = 8, 64, SHAPE[1] ** -0.5
LENGTHS = (16384, 65536)
QUANTO = "quanto int4"
TIME_GOALS = {"int8": 1.1, "int4": 2.0}
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


def inputs(kind: str, tokens: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, H, G, D], keys and values [1, H, tokens, D]."""
    keys, values = random_states(0, tokens, SHAPE, DTYPE)
    query = random_states(1, GROUPS, SHAPE, DTYPE)[0]
    if kind == "outlier":  # as trained models have them: large keys, small queries
        keys[..., 5::32] *= 10
        query[..., 5::32] *= 0.3
    return query, keys, values


def exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query.double() @ keys.double().mT * SCALE
    return scores.softmax(-1) @ values.double()


def attention_error(compressor: Compressor, kind: str) -> float:
    """Relative error of the attention output in bf16, against float64 on what was given."""
    query, keys, values = inputs(kind)
    pages = (states.reshape(-1, PAGE, DIM) for states in (keys, values))
    fields = {k: t.unflatten(0, (1, HEADS, -1)) for k, t in compressor.encode(*pages).items()}
    out = compressor.attend(query, fields, keys.shape[2], SCALE)[0]
    return relative(out, exact(query, keys, values))


def quanto_costs() -> list[str]:
    """Bytes of an element, and the same errors of what quanto gives back, in float64 from there."""
    shown = []
    for kind in ("gaussian", "outlier"):
        query, keys, values = inputs(kind)
        layer = QuantoQuantizedLayer(nbits=4)
        layer.update(keys, values)
        held = layer.update(keys[:, :, :0], values[:, :, :0])
        shown.append(f"{relative(exact(query, *held), exact(query, keys, values)):.4f}")
    codes = layer._quantized_keys
    parts = (codes._data._data.nbytes, codes._scale.nbytes, codes._shift.nbytes)
    return [f"{sum(parts) / keys.numel():.4f}", *shown]


def relative(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def bytes_per_element(compressor: Compressor) -> float:
    """Of the encoded pages of 4,096 tokens: tensors, not a formula."""
    _, keys, values = inputs("gaussian")
    fields = compressor.encode(*(states.reshape(-1, PAGE, DIM) for states in (keys, values)))
    return sum(t.numel() * t.element_size() for t in fields.values()) / 2 / keys.numel()


def step_of(model: Any, compressor: Compressor, tokens: int) -> Callable[[], Tensor]:
    """Append one token and attend to all, in a layer that holds `tokens` tokens."""
    layer = fill(PiKVCache(model, compressor=compressor), tokens, SHAPE, DTYPE).layers[0]
    new = random_states(99, 1, SHAPE, DTYPE)
    query = random_states(98, 1, (HEADS * GROUPS, DIM, DIM), DTYPE)[0]

    def step() -> Tensor:
        layer.update(*new)
        assert take_layer() is layer
        out = attend(layer, model, query, None, SCALE)
        layer.finish(None)
        return out

    return step


def quanto_step(tokens: int) -> Callable[[], Tensor]:
    """`update` of transformers' layer, and sdpa over what it returns with the queries packed."""
    layer = QuantoQuantizedLayer(nbits=4)
    layer.update(*random_states(0, tokens, SHAPE, DTYPE))
    new = random_states(99, 1, SHAPE, DTYPE)
    query = random_states(98, GROUPS, SHAPE, DTYPE)[0]
    return lambda: F.scaled_dot_product_attention(query, *layer.update(*new))


def main() -> None:
    quick = start(__doc__)
    has_quanto = not quick and importlib.util.find_spec("optimum.quanto") is not None
    rounds = {16384: 5, 65536: 3} if quick else {16384: 25, 65536: 11}
    methods = {name: method() for name, method in COMPRESSORS.items()}
    shown = " and ".join(map(str, rounds.values()))
    result = Result(
        "compressors_cpu",
        "Compressors: bytes, error and time of a decode step",
        f"one layer, {HEADS} KV and {HEADS * GROUPS} query heads of {DIM}, bf16, pages of {PAGE}; error: "
        "of the attention output over 4,096 tokens, relative, against float64, Gaussian keys or 4 of "
        f"{DIM} key channels x 10; ms: append and attention, median (least) of {shown} "
        "interleaved rounds, 1 thread, process CPU time; quanto: 4 bits, groups of 64",
        ["compressor", "bytes/element", "error", "error, outliers"]
        + [text for tokens in LENGTHS for text in (f"ms at {tokens // 1024}k", "x identity")],
    )
    model = one_layer_model()
    cells: dict[str, list[str]] = {name: [] for name in [*methods, QUANTO]}
    for tokens in LENGTHS:
        steps = {name: step_of(model, method, tokens) for name, method in methods.items()}
        if has_quanto and tokens == LENGTHS[0]:
            steps[QUANTO] = quanto_step(tokens)
        times = interleaved(steps, rounds[tokens])
        for name, time in times.items():
            ratio = time.median / times["identity"].median
            cells[name] += [f"{time.median:.2f} ({time.least:.2f})", f"{ratio:.2f}"]
            if name in TIME_GOALS:
                goal = f"{name}, {tokens} tokens: <= {TIME_GOALS[name]}x the time of identity"
                result.goal(goal, ratio, ratio <= TIME_GOALS[name])
    for name, method in [*methods.items(), *OPTIONS.items()]:
        size = bytes_per_element(method)
        errors = [f"{attention_error(method, kind):.4f}" for kind in ("gaussian", "outlier")]
        result.add(name, f"{size:.4f}", *errors, *cells.get(name, [""] * 4))
        if name in BYTE_GOALS:
            bound = BYTE_GOALS[name]
            result.goal(f"{name}: <= {bound} bytes an element", size, size <= bound)
    if has_quanto:
        result.add(QUANTO, *quanto_costs(), *cells[QUANTO], "", "")
    result.publish(quick)


if __name__ == "__main__":
    main()
