"""Gates applied before attention: what a layer's gate would choose for the layer's input."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .gates import Choice, ExpertsCall, Gate, GateOutput, declared_gates_of

# Names of the norm of a decoder layer whose output its experts and their gate read, the surest first.
_NORMS = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm")
# Read by the experts, too, where another norm is before attention; else it may be behind attention.
_AFTER_ATTENTION, _BEFORE_ATTENTION = "post_attention_layernorm", "input_layernorm"


@dataclass(frozen=True, eq=False)
class EarlyGate:
    """A gate and the norm before it, which are applied to the input of a decoder `layer`.

    Both are called without their hooks: nothing else of the model sees that they were. Arguments of
    the gate other than states are attributes of its `block`, such as a bias of its choice.
    """

    layer: nn.Module
    norm: nn.Module
    gate: GateOutput
    block: nn.Module

    def hook(self, listener: Callable[[int, Callable[[], Choice]], None]) -> RemovableHandle:
        """Call `listener` with the number of new tokens q, and a function that computes the choice."""

        def heard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            listener(states.shape[1], lambda: self.choice(states))

        return self.layer.register_forward_pre_hook(heard, with_kwargs=True)

    def choice(self, states: Tensor) -> Choice:
        """Return the choice [B * q, k] of the gate for `states` [B, q, hidden]."""
        return self.gate.choice(self.output(states))

    @torch.no_grad()
    def output(self, states: Tensor) -> Any:
        """Return what the gate returns for `states` [B, q, hidden]."""
        for weight in self.gate.module.parameters():
            if not weight.is_meta:  # accelerate brings states to weights that it offloads
                states = states.to(weight.device)
        normed: Any = self.norm.forward(states.flatten(0, 1))
        own = list(inspect.signature(type(self.gate.module).forward).parameters)[2:]
        others = {name: getattr(self.block, name) for name in own if hasattr(self.block, name)}
        return self.gate.module.forward(normed, **others)


def early_gates(
    decoder: PreTrainedModel, attention: dict[int, list[nn.Module]], gates: dict[int, Gate]
) -> dict[int, EarlyGate]:
    """Return the early gate of each layer in `gates`.

    Raises:
        ValueError: the norm before a gate is not known, or the gate alone does not choose experts.
    """
    return {idx: _early_gate(decoder, idx, attention[idx][0], gate) for idx, gate in gates.items()}


def _early_gate(decoder: PreTrainedModel, idx: int, attention: nn.Module, gate: Gate) -> EarlyGate:
    names = {id(module): name for name, module in decoder.named_modules()}
    layer = _parent(decoder, names[id(attention)])
    block = names[id(gate.module)].rpartition(".")[0]
    norm = _norm(_parent(decoder, block)) if block else None
    own = next((g for n, g in declared_gates_of(decoder) if n.startswith(f"{block}.")), None)
    if own is None:
        why = "has no gate module"
    elif norm is None or isinstance(layer, nn.ModuleList):
        why = f"has no known norm before its gate, {type(own.module).__name__}"
    else:
        early = EarlyGate(layer, norm, own, decoder.get_submodule(block))
        if _chooses(early, decoder, is_told=isinstance(gate, ExpertsCall)):
            return early
        why = f"has a gate, {type(own.module).__name__}, that alone does not choose the experts"
    raise ValueError(
        f"`experts_from` is 'early_gate', but layer {idx} of {type(decoder).__name__} {why}; it must "
        "be 'previous_layer' or 'previous_token'."
    )


def _parent(decoder: PreTrainedModel, name: str) -> nn.Module:
    return decoder.get_submodule(name.rpartition(".")[0])


def _norm(layer: nn.Module) -> nn.Module | None:
    """Return the norm before the experts of a decoder layer; None if it is not known."""
    names = _NORMS
    if hasattr(layer, _BEFORE_ATTENTION):
        names = (*_NORMS, _AFTER_ATTENTION)
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def _chooses(early: EarlyGate, decoder: PreTrainedModel, *, is_told: bool) -> bool:
    """Return whether the gate gives its choice for one token of zeros.

    If the experts are told what was chosen (`is_told`), logits alone are no choice: code between
    the gate and the experts may choose by another rule.
    """
    config: Any = decoder.config.get_text_config(decoder=True)
    token = torch.zeros(1, 1, config.hidden_size, dtype=decoder.dtype)
    try:
        output = early.output(token)
        return early.gate.names_experts(output) if is_told else bool(early.gate.choice(output))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
