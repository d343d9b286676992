"""What a decode step, one that seals and one that evicts ask of an accelerator, beside DynamicCache.

Counted on a logical accelerator: kernel launches, synchronizations and uploads. Nothing is timed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import census  # first: it puts the other folders on the path
import torch
from common import Result, start
from decoding import METHODS, Decoding, layer_kernels, new_cache, tiny_model
from torch import Tensor

LAYERS, ROWS, PADDING = 4, 8, 7
# Both leave 60 tokens above the window, of 128 or 512, in the tail: a step that seals is near.
SHORT, LONG = 1084, 8252
MOST_STEPS, STEPS_AFTER = 140, 2

COMPRESSED = ("int8", "int4", "turboquant")
RAGGED = ("adakv",)


def prompt_mask(rows: int, tokens: int, padding: int = 0) -> Tensor:
    """Return the mask [rows, tokens] of a prompt whose row i begins with i * `padding` of padding."""
    return (torch.arange(tokens) >= padding * torch.arange(rows)[:, None]).long()


ONE, FAR = f"{SHORT}", f"{LONG}"
MANY, PADDED = f"{ROWS} x {SHORT}", f"{ROWS} x {SHORT}, padded"
PROMPTS = {
    ONE: prompt_mask(1, SHORT),
    FAR: prompt_mask(1, LONG),
    MANY: prompt_mask(ROWS, SHORT),
    PADDED: prompt_mask(ROWS, SHORT, PADDING),
}


@dataclass(frozen=True)
class Cost:
    """What one kind of step costs.

    `kernels` of a decoder layer, `beside` of the rest of the step: outside of layers, and what the
    first layer does for all. `syncs` and `uploads` are of the whole step, the most seen in any.
    """

    kernels: float
    beside: float
    syncs: int
    uploads: int

    @classmethod
    def of(cls, steps: list[census.Census]) -> "Cost":
        """Return the cost of steps of one kind; kernels are those of the newest step."""
        kernels = layer_kernels(steps[-1], LAYERS)
        beside = steps[-1].count("kernel") - LAYERS * kernels
        syncs, uploads = (max(step.count(what) for step in steps) for what in ("sync", "upload"))
        return cls(kernels, beside, syncs, uploads)

    def above(self, other: "Cost") -> "Cost":
        """Return what is added to `other`."""
        names = (part.name for part in fields(self))
        return Cost(*(getattr(self, name) - getattr(other, name) for name in names))

    def __str__(self) -> str:
        return f"{self.kernels:.4g} ({self.syncs}, {self.uploads})"


class Costs:
    """What PiKVCache adds to the steps of DynamicCache: a `Cost` by prompt, method and kind."""

    def __init__(self) -> None:
        self.base: dict[str, Cost] = {}
        self.added: dict[tuple[str, str, str], Cost] = {}

    def measure(self, prompt: str, methods: list[str]) -> None:
        """Count steps after `prompt`."""
        base = self.base[prompt] = costs_of(None, PROMPTS[prompt])["plain"]
        for method in methods:
            for kind, cost in costs_of(method, PROMPTS[prompt]).items():
                self.added[prompt, method, kind] = cost.above(base)

    def cell(self, prompt: str, method: str, kind: str) -> str:
        """Return a cell of the table: kernels of a layer, and syncs and uploads of the step."""
        cost = self.added.get((prompt, method, kind))
        return "-" if cost is None else f"+{cost}"

    def values(
        self, part: str, kind: str, methods: tuple[str, ...] = (), prompt: str = ""
    ) -> list[float]:
        """Return one part of the costs of `kind`; of all methods and prompts, if none is named."""
        return [
            getattr(cost, part)
            for (of_prompt, method, of_kind), cost in self.added.items()
            if of_kind == kind and method in (methods or METHODS) and prompt in ("", of_prompt)
        ]

    def ratios(self, kind: str, prompt: str, other: str) -> list[float]:
        """Return kernels after `prompt` over those after `other`, of each method."""
        return [
            cost.kernels / self.added[other, method, kind].kernels
            for (of_prompt, method, of_kind), cost in self.added.items()
            if of_kind == kind and of_prompt == prompt and (other, method, kind) in self.added
        ]

    def differences(
        self, kind: str, prompt: str, other: str, methods: tuple[str, ...] = ()
    ) -> list[float]:
        """Return kernels after `prompt` less those after `other`, of each method."""
        pairs = (self.values("kernels", kind, methods, name) for name in (prompt, other))
        return [one - two for one, two in zip(*pairs, strict=True)]


def costs_of(method: str | None, prompt: Tensor) -> dict[str, Cost]:
    """Return the cost of a step by its kind, in a conversation that begins with `prompt`."""
    model = tiny_model(LAYERS)
    decoding = Decoding(model, new_cache(model, method))
    decoding.read(prompt)
    steps = list(counted_steps(decoding, rarest_kind(method)))
    kinds = {kind for kind, _ in steps}
    return {kind: Cost.of([step for other, step in steps if other == kind]) for kind in kinds}


def rarest_kind(method: str | None) -> str:
    if method is None:
        return "plain"
    return "evict" if "scheduler" in METHODS[method] else "seal"


def counted_steps(decoding: Decoding, until: str) -> Iterator[tuple[str, census.Census]]:
    """Yield steps, the last of them `STEPS_AFTER` the first one of the kind `until`."""
    left = MOST_STEPS
    while left > 0:
        kind, counted = decoding.step()
        yield kind, counted
        left = min(left - 1, STEPS_AFTER if kind == until else left)


def main() -> None:
    quick = start(__doc__)
    prompts = [ONE, PADDED] if quick else list(PROMPTS)
    methods = ["lossless", "int4", "keydiff"] if quick else list(METHODS)
    costs = Costs()
    for prompt in prompts:
        costs.measure(prompt, methods)
    result = Result(
        "launches/steps",
        "Added to a decode step of DynamicCache on an accelerator",
        "kernels of a decoder layer (synchronizations and uploads of the step, the most seen of its "
        f"kind); beside: kernels outside of layers. {LAYERS} layers, 4 query and 2 KV heads of 16, "
        f"bf16, sdpa, batched_mm; budget .25; prompts of so many tokens, {ROWS} rows of them where "
        f"it says so, row i of a padded batch with {PADDING} * i tokens of padding; counted on a "
        "logical accelerator, a synchronization is also needed for an upload from unpinned memory",
        ["prompt", "method", "plain", "beside", "seal", "evict"],
    )
    for prompt in prompts:
        base = costs.base[prompt]
        result.add(prompt, "DynamicCache, whole", base, f"{base.beside:.4g}", "", "")
        for method in methods:
            plain, seal, evict = (costs.cell(prompt, method, k) for k in ("plain", "seal", "evict"))
            beside = f"{costs.added[prompt, method, 'plain'].beside:+.4g}"
            result.add(prompt, method, plain, beside, seal, evict)
    if not quick:
        add_goals(result, costs)
    result.publish(quick)


def add_goals(result: Result, costs: Costs) -> None:
    """Compare the costs with what is wanted of them."""

    def at_most(limit: float, text: str, values: list[float]) -> None:
        result.goal(f"{text} <= {limit:g}", max(values), max(values) <= limit)

    lossless = ("lossless",)
    for limit in (8, 3):  # with torch's kernels, and with one of our own
        at_most(limit, "lossless, plain: kernels", costs.values("kernels", "plain", lossless, ONE))
    at_most(6, "codes, plain: kernels", costs.values("kernels", "plain", COMPRESSED, ONE))
    for methods, name in ((lossless, "lossless"), (COMPRESSED, "codes")):
        at_most(
            0,
            f"{name}, plain: kernels more at {FAR} tokens than at {ONE}",
            costs.differences("plain", FAR, ONE, methods),
        )
    at_most(
        2, "plain: kernels more with padding than without", costs.differences("plain", PADDED, MANY)
    )
    at_most(0, "plain: synchronizations", costs.values("syncs", "plain"))
    at_most(0, "plain: uploads", costs.values("uploads", "plain"))
    at_most(0, "seal: synchronizations", costs.values("syncs", "seal"))
    at_most(1, "seal: uploads", costs.values("uploads", "seal"))
    at_most(1, "evict: synchronizations", costs.values("syncs", "evict"))
    even = tuple(method for method in METHODS if method not in RAGGED)
    at_most(60, "evict: kernels, heads alike", costs.values("kernels", "evict", even, ONE))
    at_most(120, "evict: kernels, ragged heads", costs.values("kernels", "evict", RAGGED, ONE))
    at_most(
        2, "evict: kernels with padding over those of one row", costs.ratios("evict", PADDED, ONE)
    )


if __name__ == "__main__":
    main()
