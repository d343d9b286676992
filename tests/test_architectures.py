"""Every MoE architecture of transformers generates the same with PiKVCache as with its own cache.

The full sweep: `pytest tests/test_architectures.py --all-architectures`. Without the option: the
main families and a few others, which rotate with the version of pikv_hf or with `PIKV_ROTATION`.
"""

import copy
import functools
import os
import traceback
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tolerances import LOGITS
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from zoo import build, discover, prompt

import pikv_hf
from pikv_hf import PiKVCache
from pikv_hf.model.versions import cache_in, with_cache

MAIN_FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe", "granitemoe", "phimoe", "llama4", "hunyuan_v1_moe", "minimax", "jamba"),
    "qwen3_next",
)
OTHERS_PER_RUN = 8
NEW_TOKENS = 14
LENGTHS = [(29,), (30, 27, 23)]  # with pages and a window of 4, prefill and decode seal several


class Generated(NamedTuple):
    tokens: torch.Tensor
    logits: torch.Tensor  # [step, row, vocabulary]
    cache: Cache


def rotating_subset(names: Sequence[str], rotation: str) -> list[str]:
    """The main families and `OTHERS_PER_RUN` others; consecutive numbers visit all the others."""
    others = sorted(set(names) - set(MAIN_FAMILIES), key=lambda name: zlib.crc32(name.encode()))
    turn = int(rotation) if rotation.isdecimal() else zlib.crc32(rotation.encode())
    start = turn * OTHERS_PER_RUN % max(len(others), 1)
    chosen = {*MAIN_FAMILIES, *(others[start:] + others[:start])[:OTHERS_PER_RUN]}
    return [name for name in names if name in chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", chosen(metafunc.config), scope="module")


def chosen(config: pytest.Config) -> list[str]:
    names = list(discover().found)
    if config.getoption("--all-architectures"):
        return names
    return rotating_subset(names, os.environ.get("PIKV_ROTATION") or pikv_hf.__version__)


def test_discovery(sweep, pytestconfig) -> None:
    found, left_out = discover()
    sweep["generative classes left out"] = left_out
    for name in found.keys() - set(chosen(pytestconfig)):
        sweep.setdefault("left to other rotations", {})[name] = found[name].model_class.__name__
    assert set(MAIN_FAMILIES) <= found.keys()
    assert len(found) >= 63  # as many as in transformers 5.17, the oldest that we support


def test_rotation_visits_every_architecture() -> None:
    names = list(discover().found)
    turns = range(len(names) // OTHERS_PER_RUN + 1)
    assert set().union(*(rotating_subset(names, str(turn)) for turn in turns)) == set(names)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one_row", "left_padded"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_same_as_dynamic_cache(name, attn, lengths, sweep, poisoned, request) -> None:
    if attn == "sdpa" and not discover().found[name].model_class._supports_sdpa:
        sweep.setdefault("no sdpa", {})[name] = "the model class refuses it"
        pytest.skip("the model refuses sdpa")
    model = tiny(name, attn)
    inputs = prompt(model, lengths)
    expected, failure = generate_without_us(model, inputs)
    if failure is not None:
        sweep.setdefault("transformers' own cache fails", {})[request.node.callspec.id] = failure
        pytest.skip(f"transformers' own cache fails: {failure}")
    cache = PiKVCache(model, page_size=4, window=4)
    both = EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache
    assert_same(generate(model, inputs, both), expected)
    if (attn, lengths) == ("eager", LENGTHS[1]):
        for what, failure in assert_same_later(model, inputs, expected, both):
            sweep.setdefault(f"{what}: transformers' own cache fails", {})[name] = failure
    layers = cache.report().to_dict()["layers"]
    assert all(layer["pages"] for layer in layers if layer["paged"])
    assert name not in MAIN_FAMILIES or any(layer["paged"] for layer in layers)
    own = [f"{layer['layer']} {layer['kind']} ({layer['why']})" for layer in layers]
    own = [text for text, layer in zip(own, layers, strict=True) if not layer["paged"]]
    sweep.setdefault("layers not paged", {})[name] = ", ".join(own) or "none"


def assert_same_later(
    model: PreTrainedModel, inputs: dict[str, Any], first: Generated, cache: Cache
) -> list[tuple[str, str]]:
    """A second turn, whose prompt is a pass of several tokens over the filled caches, then beams.

    Returns what transformers' own cache fails at, and how.
    """
    failures = []
    ours = copy.deepcopy(cache)
    cache.reset()
    turn, beams = {"max_new_tokens": 2}, {"num_beams": 2, "max_new_tokens": 4}
    runs = [("beams", inputs, None, cache, beams)]
    if "inputs_embeds" not in inputs:
        given = second_turn(inputs, first.tokens)
        runs.append(("second turn", given, first.cache, ours, turn))
    for what, given, theirs, mine, options in runs:
        expected, failure = generate_without_us(model, given, theirs, **options)
        if expected is None or failure is not None:
            failures.append((what, str(failure)))
        else:
            assert_same(generate(model, given, mine, **options), expected)
    return failures


def second_turn(inputs: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """`inputs` of a `generate` that returned `tokens`, continued by five tokens more."""
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    more = torch.arange(5, 10).expand(len(tokens), -1)
    turn = {**inputs, name: torch.cat([tokens, more], dim=1)}
    if name == "input_ids":
        mask, generated = inputs["attention_mask"], turn[name].shape[1] - inputs[name].shape[1]
        turn["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), generated)], dim=1)
    return turn


@functools.lru_cache(maxsize=1)
def tiny(name: str, attn: str) -> PreTrainedModel:
    return build(name, attn)


def generate(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    cache: Cache | None,
    max_new_tokens: int = NEW_TOKENS,
    **options: Any,
) -> Generated:
    """Greedy `generate`; without a cache, transformers makes its `DynamicCache(config=...)`."""
    logits: list[torch.Tensor] = []
    forward = model.forward

    @functools.wraps(forward)
    def recording(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        logits.append(output.logits[:, -1].float())
        return output

    torch.manual_seed(0)  # diffusion starts from noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", recording)  # a hook would not see a direct call
        output = model.generate(
            **inputs,
            **with_cache(cache),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **options,
        )
    assert isinstance(cache_in(output), Cache if cache is None else type(cache))
    return Generated(output.sequences, torch.stack(logits), cache_in(output))


def generate_without_us(
    model: PreTrainedModel, inputs: dict[str, Any], cache: Cache | None = None, **options: Any
) -> tuple[Generated | None, str | None]:
    """What transformers' own cache gives, and why it is no reference, if it is none."""
    try:
        expected = generate(model, inputs, cache, **options)
    except Exception as error:
        if not raised_by_transformers(error):
            raise
        return None, f"{type(error).__name__}: {error}"
    return expected, None if expected.logits.isfinite().all() else "its logits are not finite"


def raised_by_transformers(error: Exception) -> bool:
    """Whether transformers, or torch called by it, raised `error`: not the zoo and not this file."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    torch_folder, folder = (os.path.dirname(module.__file__) for module in (torch, transformers))
    last = next(file for file in reversed(files) if not file.startswith(torch_folder))
    return last.startswith(folder)


def assert_same(actual: Generated, expected: Generated) -> None:
    assert actual.logits.shape == expected.logits.shape
    error = (actual.logits - expected.logits).abs().amax(-1)  # [step, row]; NaN stays NaN
    steps = ", ".join(f"{step:.1e}" for step in error.amax(-1).tolist())
    assert (error <= LOGITS).all(), f"logits differ, by step: {steps}"
    assert torch.equal(actual.tokens, expected.tokens)
    assert actual.cache.get_seq_length() == expected.cache.get_seq_length()
