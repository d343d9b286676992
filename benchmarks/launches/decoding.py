"""Models and caches on the logical accelerator, and decode steps on them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import census
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.layer.paged_layer import PagedLayer
from pikv_hf.model.versions import with_cache

DTYPE = torch.bfloat16
VOCABULARY, KV_HEADS, HEAD_DIM = 256, 2, 16

METHODS: dict[str, dict[str, Any]] = {
    "lossless": {},
    "int8": {"compressor": "int8"},
    "int4": {"compressor": "int4"},
    "turboquant": {"compressor": "turboquant"},
    "keydiff": {"scheduler": "keydiff", "budget": 0.25},
    "snapkv": {"scheduler": "snapkv", "budget": 0.25},
    "h2o": {"scheduler": "h2o", "budget": 0.25},
    "adakv": {"scheduler": "adakv", "budget": 0.25},
    "expert+int4": {"scheduler": "expert", "budget": 0.25, "compressor": "int4"},
    "streaming_llm": {"scheduler": "streaming_llm", "budget": 0.25},
    "quest": {"router": "quest"},
    "quest+int4": {"router": "quest", "compressor": "int4"},
    "topk": {"router": "topk"},
    "pikv": {"router": "pikv"},
}


def tiny_model(layers: int) -> Qwen3MoeForCausalLM:
    """Return a Mixture-of-Experts of tiny widths, on the logical accelerator."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        max_position_embeddings=1 << 17,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", dtype=DTYPE)
    census.model_on_device(model)
    return model.eval()


def new_cache(model: Qwen3MoeForCausalLM, method: str | None) -> Cache:
    """Return a cache of one of `METHODS`; None = DynamicCache."""
    return (
        DynamicCache(config=model.config) if method is None else PiKVCache(model, **METHODS[method])
    )


class Held(NamedTuple):
    """How many tokens, summed over rows and KV heads of all paged layers, have left the tails.

    Padding is in neither number.
    """

    departed: int
    evicted: int

    @classmethod
    def by(cls, cache: Cache) -> "Held":
        states = [layer.state for layer in cache.layers if isinstance(layer, PagedLayer)]
        departed = KV_HEADS * sum(sum(state.num_departed) for state in states)
        pages = [state.pages.held(row) for state in states for row in range(state.tail.batch)]
        return cls(departed, departed - sum(int(held.sum()) for held in pages if held is not None))


def kind_of_step(before: Held, after: Held) -> str:
    """Return "evict" if tokens were evicted between two states of a cache, else "seal" or "plain"."""
    if after.evicted > before.evicted:
        return "evict"
    return "seal" if after.departed > before.departed else "plain"


class Decoding:
    """One conversation of random tokens: a prompt, then steps of one token a row."""

    def __init__(self, model: Qwen3MoeForCausalLM, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.mask, self.prompt_length = torch.ones(1, 0, dtype=torch.long), 0
        self.generator = torch.Generator().manual_seed(0)

    def read(self, mask: Tensor) -> None:
        """Read a prompt; `mask` [B, T] hides padding."""
        self.mask, self.prompt_length = mask, mask.shape[1]
        self.model.set_experts_implementation("eager")
        self._forward(mask.shape[1])

    def resume(self) -> None:
        """Take note of tokens that were written to the layers of the cache directly."""
        self.mask = torch.ones(1, self.cache.get_seq_length(), dtype=torch.long)

    def step(self) -> tuple[str, census.Census]:
        """Decode one token of each row; return the kind of step and what it caused."""
        self.model.set_experts_implementation("batched_mm")
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        before = Held.by(self.cache)
        counted = self._forward(1)
        return kind_of_step(before, Held.by(self.cache)), counted

    def _forward(self, length: int) -> census.Census:
        shape = self.mask.shape[0], length
        ids = torch.randint(VOCABULARY, shape, generator=self.generator)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -length:]
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        inputs = {name: census.on_device(tensor.clone()) for name, tensor in inputs.items()}
        counted = census.Census()
        with self._generating(), counted.in_places(self.model), counted:
            self.model(**inputs, **with_cache(self.cache), logits_to_keep=1)
        return counted

    def _generating(self) -> AbstractContextManager[None]:
        """Return the context in which `generate` decodes: it makes the masks, which are not checked."""
        if not isinstance(self.cache, PiKVCache):
            return nullcontext()
        return self.cache.reading.prompt(self.prompt_length)


def layer_kernels(counted: census.Census, layers: int, within: str = "") -> float:
    """Return the kernels of a decoder layer, or of the module `within` it.

    The first layer is left out: it may work for the others as well.
    """
    numbers = [counted.count("kernel", f"model.layers.{i}.{within}") for i in range(1, layers)]
    return sum(numbers) / len(numbers)
