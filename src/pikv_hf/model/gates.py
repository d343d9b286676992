"""The model's own gates (its MoE routers), and the layers whose tokens they label."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .modules import is_attention
from .versions import declared_gates

# Experts and their weights, [B * q, k] each, for the tokens of a forward pass.
Choice = tuple[Tensor, Tensor]
# Called with a function that computes the choice, so that an unused choice costs nothing.
Listener = Callable[[Callable[[], Choice]], None]

_EXPERT_ARGUMENTS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))


@dataclass(frozen=True, eq=False)
class ExpertsCall:
    """An experts module whose arguments are the gate's choice: the experts that really run."""

    module: nn.Module
    names: tuple[str, str]
    places: tuple[int, int]

    def hook(self, listener: Listener) -> RemovableHandle:
        def heard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            experts, weights = (
                kwargs[name] if name in kwargs else args[place]
                for name, place in zip(self.names, self.places, strict=True)
            )
            listener(lambda: (experts, weights))

        return self.module.register_forward_pre_hook(heard, with_kwargs=True)


@dataclass(frozen=True, eq=False)
class GateOutput:
    """A gate whose output is read, in models that do not pass its choice to an experts module."""

    module: nn.Module
    logits_index: int
    top_k: int

    def hook(self, listener: Listener) -> RemovableHandle:
        def heard(module: nn.Module, args: Any, output: Any) -> None:
            listener(lambda: self.choice(output))

        return self.module.register_forward_hook(heard)

    def names_experts(self, output: Any) -> bool:
        """Return whether `output` tells which experts were chosen, and not only logits."""
        return self._parts(output)[2] is not None

    def choice(self, output: Any) -> Choice:
        """Return the choice in `output`; else the top-k logits, weighted by scores or softmax."""
        logits, parts, experts = self._parts(output)
        chosen = [part for part in parts if part.shape == (len(logits), self.top_k)]
        weights = next((part for part in chosen if part.is_floating_point()), None)
        if experts is None and logits.shape[1] <= self.top_k:
            raise RuntimeError(
                f"{type(self.module).__name__} does not tell which experts it chose: use router=None "
                "and a scheduler that needs no experts."
            )
        if experts is None:
            experts, weights = logits.topk(self.top_k, dim=-1).indices, None
        if weights is None:
            own = [p for p in parts if p.shape == logits.shape and p.is_floating_point()]
            scores = own[0] if own else logits.float().softmax(-1)
            weights = scores.gather(1, experts).to(logits.dtype)
        return experts, weights

    def _parts(self, output: Any) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Return the logits [tokens, experts], all other tensors, and the chosen experts if any."""
        parts = [output] if isinstance(output, Tensor) else list(output)
        logits = parts.pop(self.logits_index if len(parts) > 1 else 0)
        logits = logits.reshape(-1, logits.shape[-1])
        parts = [part for part in parts if isinstance(part, Tensor)]
        shape = len(logits), self.top_k
        indices = (p for p in parts if p.shape == shape and not p.is_floating_point())
        return logits, parts, next(indices, None)


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """The block around a gate; read if it returns logits and calls no gate (MXFP4, kernels)."""

    module: nn.Module
    top_k: int

    def hook(self, listener: Listener) -> RemovableHandle:
        def heard(module: nn.Module, args: Any, output: Any) -> None:
            if (logits := self._logits(output)) is not None:
                listener(lambda: self._choice(logits))

        return self.module.register_forward_hook(heard)

    def _logits(self, output: Any) -> Tensor | None:
        """Return the second output if it is logits [tokens, experts], experts > `top_k`."""
        if not isinstance(output, tuple) or len(output) < 2:
            return None
        hidden, logits = output[:2]
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2:
            return None
        is_of_tokens = logits.shape[0] * hidden.shape[-1] == hidden.numel()
        return logits if is_of_tokens and logits.shape[1] > self.top_k else None

    def _choice(self, logits: Tensor) -> Choice:
        largest = logits.topk(self.top_k, dim=-1)
        return largest.indices, largest.values.softmax(-1)


Gate = ExpertsCall | GateOutput


def block_of(gate: Gate, decoder: PreTrainedModel) -> BlockOutput:
    """Return the module that contains `gate`."""
    name = next(name for name, module in decoder.named_modules() if module is gate.module)
    block = decoder.get_submodule(name.rpartition(".")[0])
    return BlockOutput(block, experts_per_token(decoder.config))


def gates_of_layers(
    decoder: PreTrainedModel, attention: dict[int, list[nn.Module]]
) -> dict[int, Gate]:
    """Return, by cache layer, the first gate between its attention and the next paged attention.

    That gate labels the tokens of the layer. Layers without a gate (dense layers) are left out.
    """
    gates: dict[int, Gate] = {}
    for name, gate in all_gates(decoder):
        gates.setdefault(_block(name), gate)
    names = {id(module): name for name, module in decoder.named_modules()}
    layer_of: dict[int, int] = {}
    for idx, modules in sorted(attention.items()):
        layer_of.setdefault(_block(names[id(modules[0])]), idx)
    found = {}
    for block, idx in layer_of.items():
        end = min((other for other in layer_of if other > block), default=len(names))
        blocks = [b for b in sorted(gates) if block <= b < end]
        if blocks:
            found[idx] = gates[blocks[0]]
    return found


def all_gates(decoder: PreTrainedModel) -> Iterator[tuple[str, Gate]]:
    """Yield all gates by name, beginning with calls of experts, which show what really runs.

    Leaves out routers inside attention modules (JetMoE): they choose among projections, before the
    token is cached.
    """
    inside = tuple(f"{name}." for name, part in decoder.named_modules() if is_attention(part))
    for name, gate in (*_experts_calls(decoder), *declared_gates_of(decoder)):
        if not name.startswith(inside):
            yield name, gate


def _block(name: str) -> int:
    """Return the number of the decoder block in a module's dotted name; -1 without one."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else -1


def _experts_calls(decoder: PreTrainedModel) -> Iterator[tuple[str, ExpertsCall]]:
    for name, module in decoder.named_modules():
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        for names in _EXPERT_ARGUMENTS:
            if set(names) <= set(parameters):
                places = (parameters.index(names[0]), parameters.index(names[1]))
                yield name, ExpertsCall(module, names, places)


def declared_gates_of(decoder: PreTrainedModel) -> Iterator[tuple[str, GateOutput]]:
    """Yield the gates that model classes declare in `_can_record_outputs["router_logits"]`."""
    top_k = experts_per_token(decoder.config)
    declared: list[Any] = []
    for module in decoder.modules():
        if isinstance(module, PreTrainedModel):
            declared += declared_gates(type(module))
    for name, module in decoder.named_modules():
        for entry in declared:
            target = getattr(entry, "target_class", entry)
            layer_name = getattr(entry, "layer_name", None)
            if isinstance(module, target) and (layer_name is None or layer_name in name):
                # 1 is the default of transformers for a class without an index.
                yield name, GateOutput(module, getattr(entry, "index", 1), top_k)
                break


def experts_per_token(config: Any) -> int:
    text = config.get_text_config(decoder=True)
    names = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
    for owner in (text, getattr(text, "ffn_config", None)):
        for name in names:
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    return 1


def num_experts(config: Any) -> int:
    """Return the number of experts that a gate of a model with `config` chooses from."""
    text = config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    for owner in (text, getattr(text, "ffn_config", None)):
        for name in names:
            number = getattr(owner, name, None)
            number = max(number, default=None) if isinstance(number, list | tuple) else number
            if isinstance(number, int) and number > 0:
                return number
    raise ValueError(
        f"{type(text).__name__} does not say how many experts there are, under none of {names}."
    )


def shares(weights: Tensor) -> Tensor:
    """Return `weights` [..., k] of a gate over their sum; equal shares where the sum is 0."""
    positive = weights.float().clamp_min(0)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / total, 1 / weights.shape[-1])


def page_shares(
    experts: Tensor, weights: Tensor, num_experts: int, is_token: Tensor | None = None
) -> Tensor:
    """Return the mean share of each expert in pages, [..., E] float32 of labels [..., P, k].

    `is_token` [..., P] is True at places that hold a token; None = everywhere.
    """
    own = shares(weights)
    own = own if is_token is None else own * is_token[..., None]
    total = own.new_zeros(*own.shape[:-2], num_experts)
    return total.scatter_add_(-1, experts.long().flatten(-2), own.flatten(-2)) / own.shape[-2]
