"""What the ranks of a launch do: each case runs on every rank, and on the whole model alone.

    @case("ep", "tp", families=("qwen3_moe", "mixtral"))
    def int8(side):
        return side.generate(compressor="int8")

A case returns what JSON can hold. `test_ranks.py` compares every rank with the whole model alone,
where a cache without methods is a `DynamicCache`, and no `placement` is given; with `compare=False`
it only runs, and a test reads what the ranks return. With `by_rank=True` the result depends on
`side.rank`, which the whole model alone is given, too.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from helpers import (
    BUDGETED,
    ONE_ROW,
    PADDED,
    SMALL,
    chunks,
    dynamic,
    forward,
    generate,
    padded_prompt,
)
from transformers import Cache
from zoo import prompt

from pikv_hf import COMPRESSORS, ROUTERS, PiKVCache
from pikv_hf.model.parallel import parallelism
from pikv_hf.model.wrappers import unwrap
from pikv_hf.routers import TopK
from pikv_hf.schedulers import AdaKV, KeyDiff, PyramidKV, Tova

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
            return dynamic(unwrap(self.model))
        return PiKVCache(self.model, **{**SMALL, **options})

    def generate(
        self, *, lengths: Sequence[int] = PADDED, seed: int = 0, mode: Any = None, **options: Any
    ) -> Result:
        """Tokens and logits of a left-padded prompt; `mode`: arguments of the model's `generate`."""
        model = unwrap(self.model)
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
    by_rank: bool


CASES: dict[str, Case] = {}
JOBS: list[Job] = []


def case(
    *loadings: str,
    families: Sequence[str] = ("qwen3_moe",),
    ranks: int = 2,
    compare: bool = True,
    by_rank: bool = False,
) -> Callable[[Callable[[Side], Result]], Callable[[Side], Result]]:
    """Register a case under the name of its function, for each of `loadings` and `families`."""

    def register(run: Callable[[Side], Result]) -> Callable[[Side], Result]:
        CASES[run.__name__] = Case(run, compare, by_rank)
        JOBS.extend(
            Job(run.__module__, run.__name__, family, loading, ranks)
            for family in families
            for loading in loadings
        )
        return run

    return register


SHARED = ("ep", "plain", "pp")  # each rank has all heads of its layers
HEADS = ("tp", "tp_ep")  # each rank has one of two KV heads
OWN = ("dp_ep", "ddp")  # each rank reads other texts


@case(*SHARED, *HEADS)
@case("ep", "tp", "pp", families=("gpt_oss", "deepseek_v3"))
@case("tp_of_latents", families=("deepseek_v3",))
@case("ep", ranks=4)
def lossless(side: Side) -> Result:
    return side.generate()


@case(*SHARED, *HEADS)
@case("tp_of_latents", families=("deepseek_v3",))
def int8(side: Side) -> Result:
    return side.generate(compressor="int8")


@case("ep", "tp_ep")
def h2o(side: Side) -> Result:
    return side.generate(scheduler="h2o", budget=16)


@case("ep", "plain", "tp_ep")
@case("tp", "pp", families=("deepseek_v3",))
def snapkv(side: Side) -> Result:
    return side.generate(scheduler="snapkv", budget=0.5)


@case("tp_of_latents", families=("deepseek_v3",))
def keydiff(side: Side) -> Result:
    return side.generate(scheduler="keydiff", budget=16)


@case("ep")
def agreement(side: Side) -> Result:
    return side.generate(router=TopK(top_pages=2))


@case("ep")
def adakv(side: Side) -> Result:
    """Heads share a budget, as every rank has all of them."""
    return side.generate(scheduler="adakv", budget=16)


@case("ep", "pp")
def beams(side: Side) -> Result:
    return side.generate(mode={"num_beams": 3})


@case("ep", "tp", "pp")
def prompt_lookup(side: Side) -> Result:
    return side.generate(lengths=ONE_ROW, mode={"prompt_lookup_num_tokens": 3})


@case("pp")
def chunked_prefill(side: Side) -> Result:
    return side.generate(mode={"prefill_chunk_size": 7})


@case(*OWN, by_rank=True)
def texts_of_their_own(side: Side) -> Result:
    return side.generate(seed=side.rank)


@case(*OWN, by_rank=True)
def h2o_on_texts_of_their_own(side: Side) -> Result:
    return side.generate(seed=side.rank, scheduler="h2o", budget=16)


@case("pp", families=("gpt_oss",), compare=False)
def stage(side: Side) -> Result:
    """Why layers are not paged, and how many tokens each holds after a text."""
    cache = PiKVCache(side.model, **SMALL)
    generate(side.model, prompt(side.model, PADDED), cache)
    layers = cache.report().to_dict()["layers"]
    return {name: [layer[name] for layer in layers] for name in ("why", "tokens_held")}


@case("ddp", by_rank=True)
def forward_of_the_wrapper(side: Side) -> Result:
    """A prompt in two pieces through the wrapper itself, which has no `generate`."""
    ids, mask = padded_prompt(unwrap(side.model), [length + side.rank for length in PADDED])
    cache = side.cache()
    steps = chunks(ids.shape[1], 20, 5)
    logits = [forward(side.model, ids[:, a:b], mask[:, :b], cache)[:, -1] for a, b in steps]
    return {"tokens": [], "logits": torch.stack(logits).tolist()}


def every_method() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of methods that need no file, and the arguments of `PiKVCache` with each."""
    for name in BUDGETED:
        yield f"scheduler_{name}", {"scheduler": name, "budget": 16, "hold_prompt": name == "kvzip"}
    for name, compressor in COMPRESSORS.items():
        if not compressor.needs_calibration:
            yield f"compressor_{name}", {"compressor": name}
    for name in ROUTERS:
        yield f"router_{name}", {"router": name}
    yield "scheduler_adakv_of_keydiff", {"scheduler": AdaKV(KeyDiff()), "budget": 16}
    yield "scheduler_pyramidkv_of_tova", {"scheduler": PyramidKV(Tova()), "budget": 16}


def _register(name: str, options: dict[str, Any]) -> None:
    def run(side: Side) -> Result:
        refusal = side.refusal(**options) if side.ranks > 1 else ""
        few = {"max_new_tokens": 6}
        return {"refused": refusal} if refusal else side.generate(mode=few, **options)

    run.__name__ = name
    case(*("tp",) if name.startswith("compressor") else ("tp", "pp"))(run)
    case("tp_of_latents", families=("deepseek_v3",))(run)


for method in every_method():
    _register(*method)


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
