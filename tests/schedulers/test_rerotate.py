"""Kept keys that close the gaps: the model with a cache in which they stand side by side."""

import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers import forward, paged, spans_of, tail_length
from test_schedulers import kept
from tolerances import DRIFT, FLOAT32, LOGITS
from torch import Tensor
from transformers import DynamicCache
from zoo import build, prompt

from pikv_hf import PiKVCache
from pikv_hf.layer.rerotation import side_by_side
from pikv_hf.model.rotary import Rotary
from pikv_hf.model.versions import with_cache
from pikv_hf.schedulers import AdaKV, Needs, Random, StreamingLLM
from pikv_hf.storage.token_table import TokenTable

LENGTHS, NEW, OPEN = (60, 47), 12, 9
FAMILIES = ("mixtral", "olmoe", "deepseek_v3")


@dataclass(frozen=True)
class Scattered(Random):
    """Other tokens in every head, moved."""

    @property
    def needs(self) -> Needs:
        return Needs(inputs=frozenset({"rerotate"}))


class SideBySide:
    """One row of a model whose cache is filled by hand: keys are turned by the model's own code."""

    def __init__(self, model) -> None:
        self.model, self.module = model, model.model.layers[0].self_attn
        self.free: list[
            Tensor
        ] = []  # keys [H, T, D] before RoPE, or [latent | rotary key] [1, T, D]
        self.values: list[Tensor] = []
        names = ("kv_a_proj_with_mqa", "k_norm", "k_proj")
        self.name = next(name for name in names if hasattr(self.module, name))

    @torch.no_grad()
    def step(self, ids: Tensor, cache: DynamicCache, start: int) -> Tensor:
        """Logits [T, vocabulary] of tokens at positions `start` and later; notes their keys."""
        free: list[Tensor] = []
        hooks = [
            getattr(layer.self_attn, self.name).register_forward_hook(
                lambda module, args, output: free.append(output[0])
            )
            for layer in self.model.model.layers
        ]
        positions = torch.arange(start, start + len(ids))[None]
        out = self.model(ids[None], position_ids=positions, **with_cache(cache))
        for hook in hooks:
            hook.remove()
        rank = getattr(self.module, "kv_lora_rank", None)
        for at, (keys, layer) in enumerate(zip(free, cache.layers, strict=True)):
            if rank is None:
                keys = keys.unflatten(-1, (layer.keys.shape[1], -1)).transpose(0, 1)
                values = layer.values[0, :, -len(ids) :]
            else:
                keys, values = keys[None, :, rank:], layer.keys[0, :, -len(ids) :]
            if len(self.free) == at:
                self.free.append(keys), self.values.append(values)
            else:
                self.free[at] = torch.cat([self.free[at], keys], 1)
                self.values[at] = torch.cat([self.values[at], values], 1)
        return out.logits[0]

    def cache_of(self, tokens: list[list[list[int]]]) -> DynamicCache:
        """A cache of `tokens` [layer][head], ascending, each head's at positions 0, 1, 2, ..."""
        cache = DynamicCache(config=self.model.config)
        for at, heads in enumerate(tokens):
            keys = torch.stack([k[i] for k, i in zip(self.free[at], heads, strict=True)])[None]
            values = torch.stack([v[i] for v, i in zip(self.values[at], heads, strict=True)])[None]
            positions = torch.arange(len(heads[0]))[None]
            cos, sin = self.model.model.rotary_emb(keys, positions)
            turned = self._apply(keys, cos, sin)
            rank = getattr(self.module, "kv_lora_rank", None)
            cache.update(*((turned, values) if rank is None else (values, turned)), at)
        return cache

    def _apply(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE as the model's file has it."""
        from importlib import import_module

        file = import_module(type(self.model).__module__)
        name = "apply_rotary_pos_emb"
        if getattr(self.model.config, "rope_interleave", False):
            name += "_interleave"
        return getattr(file, name)(keys, keys, cos, sin)[1]


def differences(model, scheduler, lengths=LENGTHS, **options) -> float:
    """Greatest difference of logits between the cache and one whose tokens stand side by side."""
    inputs = prompt(model, [length + NEW for length in lengths])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"page_size": 1, "window": OPEN, **options}
    cache = PiKVCache(model, scheduler=scheduler, **options)
    length = max(lengths)
    forward(model, ids[:, :length], mask[:, :length], cache)
    oracles, worst = [], 0.0
    for row, own in enumerate(lengths):
        oracle = SideBySide(model)
        first = ids[row, length - own : length]
        oracle.step(first, DynamicCache(config=model.config), 0)
        oracles.append(oracle)
    for end in range(length + 1, length + NEW + 1):
        opened = tail_length(paged(cache)[0])
        held = []
        for row, own in enumerate(lengths):
            pad = length - own
            tail = list(range(end - 1 - opened, end - 1))
            held.append(
                [
                    [[at - pad for at in sorted(head) + tail] for head in heads]
                    for heads in kept(cache, row)
                ]
            )
        logits = forward(model, ids[:, end - 1 : end], mask[:, :end], cache)
        for row, oracle in enumerate(oracles):
            start = len(held[row][0][0])
            expected = oracle.step(ids[row, end - 1 : end], oracle.cache_of(held[row]), start)
            worst = max(worst, float((logits[row] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS], ids=["one_row", "left_padded"])
def test_streaming_llm_with_cache_positions(name, lengths) -> None:
    """The published method, step by step; without it, kept keys are too far away."""
    model = build(name)
    assert differences(model, StreamingLLM(4, 20, rerotate=True), lengths) <= LOGITS
    assert differences(model, StreamingLLM(4, 20), lengths) > 10 * LOGITS


@pytest.mark.parametrize(
    "options", [{"page_size": 4}, {"interval": 5}, {"page_size": 3, "window": 6}]
)
def test_pages_and_intervals(options) -> None:
    """However many tokens are dropped at a time."""
    model = build("mixtral")
    assert differences(model, StreamingLLM(3, 17, rerotate=True), **options) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_other_tokens_in_every_head(name) -> None:
    """Each head closes its own gaps, of which there are many."""
    model = build(name)
    assert differences(model, Scattered(), budget=30) <= LOGITS
    assert differences(model, Random(), budget=30) > 10 * LOGITS


def test_gaps_of_heads_of_different_lengths() -> None:
    """Where heads keep different numbers of tokens, -1 stands for none: of these nothing is known."""
    rotary = Rotary(torch.tensor([1.0, 0.3]))
    layer = SimpleNamespace(turning=rotary)
    free = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(0))
    zero, places = torch.zeros(1), torch.arange(7)
    keys = rotary.rotate(free, zero, places)
    chosen = torch.tensor([[[0, 3, 5, 6], [2, 4, -1, -1]]])
    stays = TokenTable({"keys": keys}).gather(chosen.clamp_min(0))
    moved = side_by_side(layer, stays, chosen, 7)["keys"]
    first = rotary.rotate(free[0, 0, [0, 3, 5, 6]], zero, torch.arange(3, 7))
    second = rotary.rotate(free[0, 1, [2, 4]], zero, torch.arange(5, 7))
    assert (moved[0, 0] - first).abs().max() <= FLOAT32
    assert (moved[0, 1, :2] - second).abs().max() <= FLOAT32
    assert torch.equal(moved[0, 0, 2:], keys[0, 0, 5:]), "what stays keeps every bit"


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("dtype", DRIFT)
def test_long_stream(name, dtype) -> None:
    """Sinks that have moved hundreds of times are where they should be; a saved copy goes on."""
    model = build(name, dtype=dtype, num_hidden_layers=1)
    ids = prompt(model, (700,))["input_ids"]
    scheduler = StreamingLLM(4, 20, rerotate=True)
    cache = PiKVCache(model, scheduler=scheduler, page_size=1, window=OPEN)
    for end in range(60, 701, 2):
        start = 0 if end == 60 else end - 2
        forward(model, ids[:, start:end], torch.ones(1, end), cache)
        if end == 400:
            cache = pickle.loads(pickle.dumps(cache)).attach(model)
    layer, whole = paged(cache)[0], PiKVCache(model)
    forward(model, ids, torch.ones(1, 700), whole)
    states, rotary = paged(whole)[0].states(), cache.states[0].rotary
    original = states[0] if layer.state.latent_rank is None else torch.cat(states, -1)
    span = spans_of(layer, [0])[0]
    gap = 700 - tail_length(layer) - span["keys"].shape[2]
    assert gap > 600
    positions = torch.arange(4)
    expected = rotary.rotate(original[:, :, :4].float(), positions, positions + gap)
    error = (span["keys"][:, :, :4].float() - expected)[..., rotary.turning].norm()
    assert error <= DRIFT[dtype] * expected[..., rotary.turning].norm()
    assert ("rest" in span) == (dtype != torch.float32)


def test_refused() -> None:
    """Encodings that would lose more with each move, models without RoPE, images."""
    model, scheduler = build("mixtral"), StreamingLLM(rerotate=True)
    with pytest.raises(ValueError, match="`compressor` is Int8.*each time they would lose more"):
        PiKVCache(model, scheduler=scheduler, compressor="int8")
    with pytest.raises(ValueError, match="no layer that is paged has one"):
        PiKVCache(build("jamba"), scheduler=scheduler)
    with pytest.raises(ValueError, match="'dynamic'"):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        PiKVCache(build("mixtral", rope_parameters=rope), scheduler=AdaKV(scheduler), budget=50)
    seeing = build("qwen3_vl_moe")
    cache = PiKVCache(seeing, scheduler=scheduler)
    ids = prompt(seeing, (8,))["input_ids"]
    positions = torch.arange(8).expand(3, 1, -1).clone()
    positions[1, 0, 3:5] = 3
    with pytest.raises(ValueError, match="images"), torch.no_grad():
        seeing(input_ids=ids, position_ids=positions, **with_cache(cache))
    with pytest.raises(TypeError, match="`rerotate` is 1"):
        StreamingLLM(rerotate=1)
