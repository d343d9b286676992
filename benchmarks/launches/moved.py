"""Bytes that attention of a step moves off the CPU, for each byte held; and how far it rounds.

The tensors of each operator are counted once, as an accelerator reads and writes them.
"""

import census  # first: it puts the other folders on the path
import torch
from common import Result, start
from one_layer import DIM, GROUPS, HEADS, OneLayer, new_tokens
from pikv_kernels.partial_attention import partial_attention, partial_attention_reference
from torch import Tensor

TOKENS = 4096
# Method -> bytes moved over bytes held.
GOALS = {"identity": 1.1, "int8": 1.3, "int4": 1.3, "turboquant": 1.3}
SPREADS = (1.0, 3.0, 6.0)
ERROR_GOAL = 1.5


def moved(method: str, tokens: int) -> tuple[float, float]:
    """Return the bytes that a plain step moves and those that the layer holds for it."""
    layer = OneLayer(tokens, census.DEVICE, compressor=method)
    layer.attend(*new_tokens(1))
    with census.Census() as counted:
        layer.attend(*new_tokens(1))
    return counted.nbytes, layer.attention_bytes()


def errors(spread: float, tokens: int) -> tuple[float, float]:
    """Return relative errors, against float64, of the accelerator's branch and of a flash kernel."""
    layer = OneLayer(tokens, census.DEVICE)
    query, keys, values = new_tokens(1, spread)
    ours = layer.attend(query, keys, values).cpu().transpose(1, 2)
    packed = query.view(1, HEADS, GROUPS, DIM)
    keys, values = torch.cat([layer.keys, keys], 2), torch.cat([layer.values, values], 2)
    flash, _ = partial_attention(packed, keys, values, None, DIM**-0.5)  # on the CPU
    wide = (states.double() for states in (packed, keys, values))
    exact, _ = partial_attention_reference(*wide, None, DIM**-0.5)

    def error(out: Tensor) -> float:
        return float((out.reshape(exact.shape).double() - exact).norm() / exact.norm())

    return error(ours), error(flash)


def main() -> None:
    quick = start(__doc__)
    tokens = TOKENS // 4 if quick else TOKENS
    result = Result(
        "launches/moved",
        "Bytes moved, and rounding, of attention off the CPU",
        f"one step over {tokens} tokens of {HEADS} KV heads of {DIM}, {GROUPS * HEADS} query heads, "
        "bf16, append included. Bytes: least = held, in units of bf16 keys and values. Error of a "
        "lossless cache against float64: least = torch's CPU flash kernel. On a logical accelerator",
        ["", "least", "seen", "ratio"],
    )
    dense = 2.0 * HEADS * DIM * 2 * tokens
    for method, limit in GOALS.items():
        of_step, held = moved(method, tokens)
        ratio = of_step / held
        result.add(f"{method}: bytes", held / dense, of_step / dense, ratio)
        result.goal(f"{method}: moved <= {limit} x held", ratio, ratio <= limit)
    for spread in SPREADS:
        ours, flash = errors(spread, tokens)
        ratio = ours / flash
        result.add(f"score spread {spread:g}: error", f"{flash:.2e}", f"{ours:.2e}", ratio)
        text = f"score spread {spread:g}: error <= {ERROR_GOAL} of a flash kernel's"
        result.goal(text, ratio, ratio <= ERROR_GOAL)
    result.publish(quick)


if __name__ == "__main__":
    main()
