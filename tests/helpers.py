"""What the tests of `generate`, attaching, methods and placement share."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tolerances import LOGITS
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from zoo import build, prompt

from pikv_hf import SCHEDULERS, PiKVCache
from pikv_hf.compressors import Identity, MixedCompressor
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.model.versions import cache_in, with_cache

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next")  # GQA, MLA, sinks + sliding, hybrid
ONE_ROW, PADDED = (29,), (30, 27, 23)
SMALL = {"page_size": 4, "window": 4}
NEW_TOKENS = 11
FEW_LAYERS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2},
    "deepseek_v3": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_next": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}
# Schedulers that keep to any budget; the others need a file (test_duo.py, test_pikv_quest.py).
BUDGETED = [name for name, method in SCHEDULERS.items() if not method.needs_file]


@dataclass(frozen=True)
class Negated(Identity):
    """Stores -x for x: an encoding that differs from the identity, without a loss."""

    def encode(self, keys, values):
        return {"minus_keys": -keys, "minus_values": -values}

    def decode(self, fields):
        return -fields["minus_keys"], -fields["minus_values"]


@dataclass(frozen=True)
class Scattered(MixedCompressor):
    """Chooses among lossless encodings by the sign of a key: another number in every head."""

    @property
    def members(self):
        return Identity(), Negated()

    def assign(self, keys, values, queries):
        return (keys[..., 0, 0] > 0.3).long()

    def bytes_per_token(self, key_dim, value_dim, element_size, page_size):
        return Identity().bytes_per_token(key_dim, value_dim, element_size, page_size)


class Generated(NamedTuple):
    tokens: Tensor
    logits: Tensor  # [step, row, vocabulary]


@functools.cache
def tiny(name: str, attn: str = "eager", **fields: Any) -> PreTrainedModel:
    """A tiny model that tests share: none may change it."""
    return build(name, attn, **fields)


@functools.cache
def two_layers(name: str) -> PreTrainedModel:
    """`tiny` with two layers: of each kind one, where there are two. Tests share it."""
    return build(name, "eager", **FEW_LAYERS.get(name, {}))


@functools.cache
def exact_model(name: str) -> PreTrainedModel:
    """In float64, where no rounding error moves a number to the next code; none may change it."""
    attn = "eager" if name == "gpt_oss" else "sdpa"
    model = build(name, attn, dtype=torch.float64, **FEW_LAYERS.get(name, {}))
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model


def generate(
    model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, **options: Any
) -> Generated:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, **options}
    out = model.generate(
        **inputs,
        **with_cache(cache),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    assert cache_in(out) is cache
    return Generated(out.sequences, torch.stack(out.logits).float())


def dynamic(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def assert_same(actual: Generated, expected: Generated) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert_close(actual.logits, expected.logits)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.isfinite().all()
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= LOGITS, f"differs by {error:.1e}"


def paged(cache: PiKVCache) -> list[PagedLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, PagedLayer)]
    assert layers and all(layer.state.unpaged_reason is None for layer in layers)
    return layers


def slabs_of(layer: PagedLayer) -> list[Any]:
    """The stores of the pages of a layer."""
    return layer.state.pages.slabs


def held_by(layer: PagedLayer, row: int) -> Tensor | None:
    """Sealed tokens of each KV head of a batch row; None = none at all."""
    return layer.state.pages.held(row)


def spans_of(layer: PagedLayer, rows: list[int]) -> list[Any]:
    """The sealed tokens of batch rows that read the same pages, decoded, the oldest first."""
    return layer.state.pages.spans(rows)


def rows_of(layer: PagedLayer) -> int:
    return layer.state.tail.batch


def tail_length(layer: PagedLayer) -> int:
    return layer.state.tail.length


def tail_states(layer: PagedLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of the newest tokens, which are not sealed."""
    return layer.state.tail.view()


def tail_labels(layer: PagedLayer) -> Any:
    return layer.state.tail.labels


def queries_of(layer: PagedLayer) -> Tensor | None:
    """The newest queries that the layer keeps for its methods."""
    return layer.state.observed.queries


def sealed(layer: PagedLayer, row: int) -> list[int]:
    """Positions of the sealed tokens of a batch row, the same in all heads."""
    found: list[int] = []
    for reader, tokens in page_contents(layer):
        if reader == row:
            assert (tokens["positions"] == tokens["positions"][:1]).all()
            found += tokens["positions"][0].tolist()
    return found


def page_contents(layer: PagedLayer) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What is known of sealed tokens: a batch row, and [H or 1, T, ...] by name; in turn."""
    for row in range(layer.state.tail.batch):
        for span in layer.state.pages.spans([row]):
            yield row, {name: t[0] for name, t in span.without("keys", "values").tensors.items()}


def assert_sealed_in_prefill_and_decode(cache: PiKVCache, prompt_length: int) -> None:
    for layer in paged(cache):
        for row in range(layer.state.tail.batch):
            positions = sealed(layer, row)
            assert positions, "no page was sealed"
            assert positions[0] < prompt_length <= positions[-1], (positions, prompt_length)


def forward(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, **options: Any
) -> Tensor:
    """Logits of one forward pass over `ids` [B, q]; `mask` [B, cached + q], 0 at padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"attention_mask": mask, **options}
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, **with_cache(cache), **options).logits


def chunks(length: int, first: int, step: int = 1) -> list[tuple[int, int]]:
    """A prefill of `first` tokens and steps of `step`: (start, end) of each."""
    starts = [0, *range(first, length, step)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def padded_prompt(model: PreTrainedModel, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    inputs = prompt(model, lengths)
    return inputs["input_ids"], inputs["attention_mask"]
