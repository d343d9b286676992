"""The model's own gates (its MoE routers): where they are, which layer's tokens each one labels."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Gate:
    """A gate module, where its output holds the logits, and how many experts a token gets."""

    module: nn.Module
    logits_index: int
    top_k: int

    def __hash__(self) -> int:
        return id(self.module)

    def choice(self, output: Any) -> tuple[Tensor, Tensor]:
        """Expert ids and their weights, both [tokens, k], out of what the gate returned.

        Ids and weights as the gate chose them where it says so; else the k largest logits and
        their softmax.
        """
        parts = [output] if isinstance(output, Tensor) else list(output)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        for experts in tensors:
            if experts.dim() == 2 and experts.dtype == torch.int64:
                same = [t for t in tensors if t.is_floating_point() and t.shape == experts.shape]
                if same:
                    return experts, same[0]
        logits = parts[self.logits_index] if len(parts) > 1 else tensors[0]
        logits = logits.reshape(-1, logits.shape[-1])
        weights, experts = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        return experts, weights.to(logits.dtype)


def gates_of_layers(
    decoder: PreTrainedModel, attention: dict[int, list[nn.Module]]
) -> dict[int, Gate]:
    """For each cache layer the gate that labels its tokens: the first that runs after its attention
    and before the next paged attention. Layers without one (dense ones) are left out."""
    gates = {_block(name): gate for name, gate in reversed(list(_find(decoder)))}
    names = {id(module): name for name, module in decoder.named_modules()}
    block_of: dict[int, int] = {}
    for idx, modules in sorted(attention.items()):
        block = _block(names[id(modules[0])])
        if block not in block_of.values():
            block_of[idx] = block
    starts = sorted(block_of.values())
    found = {}
    for idx, block in block_of.items():
        end = next((start for start in starts if start > block), max(gates, default=0) + 1)
        own = [b for b in sorted(gates) if block <= b < end]
        if own:
            found[idx] = gates[own[0]]
    return found


def _block(name: str) -> int:
    """The decoder block that a module's dotted name lies in."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else -1


def _find(decoder: PreTrainedModel) -> Iterator[tuple[str, Gate]]:
    """The gates that the model classes declare in `_can_record_outputs["router_logits"]`."""
    top_k = _experts_per_token(decoder.config)
    declared: list[Any] = []
    for module in decoder.modules():
        if isinstance(module, PreTrainedModel):
            entry = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")
            declared += entry if isinstance(entry, list) else [entry] if entry is not None else []
    for name, module in decoder.named_modules():
        for entry in declared:
            target = getattr(entry, "target_class", entry)
            layer_name = getattr(entry, "layer_name", None)
            if isinstance(module, target) and (layer_name is None or layer_name in name):
                yield name, Gate(module, getattr(entry, "index", 0), top_k)
                break


def _experts_per_token(config: Any) -> int:
    text = config.get_text_config(decoder=True)
    names = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
    for owner in (text, getattr(text, "ffn_config", None)):
        for name in names:
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    return 1
