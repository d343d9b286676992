"""What `compare_kvpress.py` compares: methods, cases and tiny models.

Imported in two environments, with different versions of transformers: needs torch and transformers.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "qwen3", "phi3")
VOCABULARY = 2048
REPEAT = (5, 6, 7)  # token ids


class Case(NamedTuple):
    """A prompt of `length` tokens, of which about `share` is kept, by a model drawn from `seed`."""

    family: str
    seed: int
    length: int
    share: float
    layers: int = 4

    @property
    def name(self) -> str:
        return f"{self.family}-{self.seed}-{self.length}"

    def model(self, attention: str) -> PreTrainedModel:
        config = AutoConfig.for_model(
            self.family,
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=0,
            eos_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for number, (_, weight) in enumerate(sorted(model.named_parameters())):
            noise = uniform(self.seed * 1000 + number, weight.numel()).view_as(weight)
            # Norms of 1 to 2; products of normed states of about that size, too.
            scale = 0.5 if weight.dim() == 1 else 2.6 * weight.shape[1] ** -0.5
            weight.data.copy_(scale * noise + (1.5 if weight.dim() == 1 else 0.0))
        return model

    def prompt(self) -> Tensor:
        """Ids [1, length], all different: equal tokens have keys of equal norm."""
        return uniform(self.seed, VOCABULARY).argsort()[None, : self.length]


def uniform(seed: int, count: int) -> Tensor:
    """`count` numbers in [-1, 1], the same on every machine and with every version of torch."""
    mixed = torch.arange(1, count + 1) + (seed << 32)
    for _ in range(3):
        mixed = (mixed ^ (mixed >> 29)) * 7046029254386353131
    return ((mixed >> 40).double() / 2**23).float()


EVEN = ((240, 0.5), (480, 0.25), (720, 0.2))  # whole chunks of 20 tokens
ODD = ((301, 0.5), (517, 0.25), (731, 0.2))
CASES = [
    Case(family, seed, length, share)
    for (length, share), family, seed in product(EVEN + ODD, FAMILIES, (1, 2))
]
SMALL = Case("llama", 3, 100, 0.6, layers=2)  # whose result is a file of the tests


@dataclass(frozen=True)
class Row:
    """A method of both.

    Args:
        name: the method's, and how it is set if not as it comes.
        press: of kvpress, as its constructor is called; the share is set afterwards.
        scheduler: ours, as `--cache` takes it.
        window: newest tokens that the press never drops.
        attention: implementation that the press needs.
        chunk: only prompts are compared whose length is a multiple of it.
        at_layer_budgets: every layer of ours keeps as many as that of kvpress.
        repeats: the model reads the prompt a second time, asked to by `REPEAT`.
        differs: the kept sets are not the same: what to say of that.
    """

    name: str
    press: str
    scheduler: str
    window: int = 0
    attention: str = "sdpa"
    chunk: int = 1
    at_layer_budgets: bool = False
    repeats: bool = False
    differs: str = ""

    @property
    def method(self) -> str:
        return self.name.partition(",")[0]


EXPLAINED = "differs, see docs/methods.md"
CHUNKS = "ChunkKVPress(SnapKVPress(window_size=20))", "chunkkv(scorer=snapkv(window_size=20))", 20
PYRAMID = "PyramidKVPress(window_size=4)", "pyramidkv(scorer=snapkv(window_size=4))", 4
OBSERVED = "h2o(recent_ratio=0, mean=True)"

ROWS = [
    Row("streaming_llm", "StreamingLLMPress()", "streaming_llm"),
    Row("snapkv", "SnapKVPress(window_size=32)", "snapkv(window_size=32)", 32),
    Row("tova", "TOVAPress()", "tova", 1),
    Row("knorm", "KnormPress()", "knorm"),
    Row("keydiff", "KeyDiffPress()", "keydiff"),
    Row("h2o, mean, none recent", "ObservedAttentionPress()", OBSERVED, attention="eager"),
    Row("h2o", "ObservedAttentionPress()", "h2o", attention="eager", differs=EXPLAINED),
    Row(
        "expected_attention, all queries",
        "ExpectedAttentionPress()",
        "expected_attention(window_size=2048)",
    ),
    Row(
        "expected_attention",
        "ExpectedAttentionPress()",
        "expected_attention",
        differs=EXPLAINED,
    ),
    Row("chunkkv, whole chunks", *CHUNKS, chunk=20),
    Row("chunkkv", *CHUNKS, differs=EXPLAINED),
    Row("pyramidkv, same layer budgets", *PYRAMID, at_layer_budgets=True),
    Row("pyramidkv", *PYRAMID, differs=EXPLAINED),
    Row(
        "adakv",
        "AdaKVPress(SnapKVPress(window_size=32))",
        "adakv(scorer=snapkv(window_size=32))",
        32,
    ),
    Row(
        "adakv, alpha=0.95",
        "AdaKVPress(KnormPress(), alpha_safeguard=0.95)",
        "adakv(scorer=knorm, alpha=0.95)",
    ),
    Row(
        "lagkv, cross_scoring",
        "LagKVPress(lag_size=32, cross_scoring=True)",
        "lagkv(lag_size=32, cross_scoring=True)",
    ),
    Row("lagkv", "LagKVPress(lag_size=32)", "lagkv(lag_size=32)", differs=EXPLAINED),
    Row(
        "criticalkv, nothing protected",
        "CriticalKVPress(ObservedAttentionPress())",
        f"criticalkv(scorer={OBSERVED}, epsilon=4e-4)",  # h2o sums 4 query heads: no mean
        attention="eager",
    ),
    Row(
        "criticalkv",
        "CriticalKVPress(SnapKVPress(window_size=32))",
        "criticalkv(scorer=snapkv(window_size=32))",
        32,
        differs=EXPLAINED,
    ),
    Row(
        "kvzip",
        "KVzipPress(layerwise=True)",
        f"adakv(scorer=kvzip(prompt_ids={REPEAT}), alpha=0)",
        repeats=True,
    ),
    Row("random", "KnormPress()", "random", differs="the control"),
]
