"""What the ranks of a launch do: each case runs on every rank, and on the whole model alone.

    @case("ep", "tp", families=("qwen3_moe", "mixtral"))
    def int8(side):
        return side.generate(compressor="int8")

A case returns what JSON can hold. `test_ranks.py` compares every rank with the whole model alone,
where a cache without methods is a `DynamicCache`, and no `placement` is given; with `compare=False`
it only runs, and a test reads what the ranks return.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from helpers import PADDED, SMALL, dynamic, generate
from transformers import Cache
from zoo import prompt

from pikv_hf import PiKVCache
from pikv_hf.model.parallel import parallelism, without_ddp

Result = dict[str, Any]
# Arguments of PiKVCache that make no method of it.
PLAIN = {"placement", "page_size", "window"}


class Job(NamedTuple):
    """A case on one model in one loading; `module` is where the case is defined."""

    module: str
    case: str
    family: str
    loading: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.case}-{self.family}-{self.loading}-{self.ranks}"


@dataclasses.dataclass(frozen=True)
class Side:
    """One rank with its part of a model, or one process with the whole model (`ranks` = 1)."""

    model: Any
    rank: int = 0
    ranks: int = 1

    def cache(self, **options: Any) -> Cache:
        """A cache for the model; alone, and without a method, a `DynamicCache`."""
        if self.ranks > 1:
            return PiKVCache(self.model, **{**SMALL, **options})
        options.pop("placement", None)
        if not options.keys() - PLAIN:
            return dynamic(without_ddp(self.model))
        return PiKVCache(self.model, **{**SMALL, **options})

    def generate(
        self, *, lengths: Sequence[int] = PADDED, seed: int = 0, mode: Any = None, **options: Any
    ) -> Result:
        """Tokens and logits of a left-padded prompt; `mode`: arguments of the model's `generate`."""
        model = without_ddp(self.model)
        inputs, cache = prompt(model, lengths, seed), self.cache(**options)
        tokens, logits = generate(model, inputs, cache, **(mode or {}))
        return {"tokens": tokens.tolist(), "logits": logits.tolist()}

    def refusal(self, **options: Any) -> str:
        """The sentence with which a cache is refused; empty if it is made."""
        try:
            PiKVCache(self.model, **options)
        except ValueError as error:
            return str(error)
        return ""


class Case(NamedTuple):
    run: Callable[[Side], Result]
    compare: bool


CASES: dict[str, Case] = {}
JOBS: list[Job] = []


def case(
    *loadings: str, families: Sequence[str] = ("qwen3_moe",), ranks: int = 2, compare: bool = True
) -> Callable[[Callable[[Side], Result]], Callable[[Side], Result]]:
    """Register a case under the name of its function, for each of `loadings` and `families`."""

    def register(run: Callable[[Side], Result]) -> Callable[[Side], Result]:
        CASES[run.__name__] = Case(run, compare)
        JOBS.extend(
            Job(run.__module__, run.__name__, family, loading, ranks)
            for family in families
            for loading in loadings
        )
        return run

    return register


@case("ep", "tp", "tp_ep", "pp", "dp_ep", "plain", "ddp", compare=False)
@case("tp", families=("gpt_oss", "deepseek_v3"), compare=False)
@case("ep", families=("gpt_oss", "deepseek_v3"), compare=False)
@case("tp_of_latents", families=("deepseek_v3",), compare=False)
@case("dp_tp", ranks=4, compare=False)
def told(side: Side) -> Result:
    """What `parallelism` says, and the ranks of the group."""
    found = parallelism(side.model)
    ranks = None if found.group is None else dist.get_process_group_ranks(found.group)
    numbers = {name: getattr(found, name) for name in ("tp", "ep", "pp", "dp")}
    numbers |= {name: getattr(found, name) for name in ("shards_heads", "shares_batch")}
    parts = {name: getattr(found, name) for name in ("experts", "layers")}
    refused = ""
    try:
        found.sharing_group("Spread()")
    except ValueError as error:
        refused = str(error)
    lists = {name: None if part is None else list(part) for name, part in parts.items()}
    return {**numbers, **lists, "group": ranks, "refused": refused}
