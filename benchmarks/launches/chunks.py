"""Peak memory of attention of several new tokens over pages, for each of its scores.

What is allocated is read from torch's profiler, also inside of operators.
"""

import itertools
from collections.abc import Callable

import census  # first: it puts the other folders on the path
import torch
from common import Result, start
from one_layer import DIM, GROUPS, HEADS, OneLayer, new_tokens
from torch.autograd.profiler import profile

TOKENS, NEW = 8192, 256
DEVICES = {"CPU": torch.device("cpu"), "accelerator": census.DEVICE}
METHODS = ("identity", "int8", "int4", "turboquant")
GOAL = 1.0


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that `run` has allocated at a time, beside what was there before."""
    with profile(profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes))


def bytes_per_score(method: str, device: torch.device) -> float:
    """Return the peak of `NEW` tokens over `TOKENS`."""
    layer = OneLayer(TOKENS, device, compressor=method)
    states = new_tokens(NEW)
    scores = HEADS * GROUPS * NEW * (TOKENS + NEW)
    return peak_bytes(lambda: layer.attend(*states)) / scores


def main() -> None:
    quick = start(__doc__)
    result = Result(
        "launches/chunks",
        "Peak memory of a chunk of new tokens over pages",
        f"bytes per score; {NEW} new tokens over {TOKENS}, {HEADS} KV heads of {DIM}, "
        f"{GROUPS * HEADS} query heads, bf16, append and seal included; accelerator: logical",
        ["method", *DEVICES],
    )
    for method in METHODS[:1] if quick else METHODS:
        values = [bytes_per_score(method, device) for device in DEVICES.values()]
        result.add(method, *values)
        for device, value in zip(DEVICES, values, strict=True):
            text = f"{method}, {device}: bytes per score <= {GOAL:g}"
            result.goal(text, value, value <= GOAL)
    result.publish(quick)


if __name__ == "__main__":
    main()
