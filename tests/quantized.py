"""Stand-ins for quantized modules: each has the shape of a library's, and holds eight bits a weight.

They hold the weights of the module that they replace, rounded; `round_weights` rounds those of a
plain model alike.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

STEPS = 127


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / STEPS
    return (weight / scale).round().to(torch.int8), scale


class QuantizedTensor(torch.Tensor):
    """As torchao's: a weight that says it is float32, and can be multiplied by and nothing else."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Self:
        new = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        new.codes, new.scale = codes, scale
        return new

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Any:
        if function is F.linear:
            states, weight, *bias = args
            return F.linear(states, weight.codes * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"a quantized weight has no {function}")


def torchao(linear: nn.Linear) -> nn.Module:
    """The module stays; its weight is of another tensor class."""
    weight = QuantizedTensor(*_codes(linear.weight.data))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class FP8Linear(nn.Linear):
    """As transformers' own: a Linear whose weight is float8, with scales beside it."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "FP8Linear":
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        codes, scale = _codes(linear.weight.data)
        new.weight = nn.Parameter(codes.view(torch.float8_e4m3fn), requires_grad=False)
        new.weight_scale_inv, new.bias = nn.Parameter(scale), linear.bias
        return new

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.weight.view(torch.int8) * self.weight_scale_inv, self.bias)


class Linear4bit(nn.Linear):
    """As bitsandbytes': a Linear whose weight is a column of bytes."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Linear4bit":
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        codes, new.scale = _codes(linear.weight.data)
        new.weight = nn.Parameter(codes.view(torch.uint8).view(-1, 1), requires_grad=False)
        new.bias = linear.bias
        return new

    def forward(self, states: Tensor) -> Tensor:
        codes = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return F.linear(states, codes * self.scale, self.bias)


class WQLinear(nn.Module):
    """As AWQ's and GPTQ's: no Linear, and no weight: packed whole numbers, inputs as rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = _codes(linear.weight.data)
        self.register_buffer("qweight", codes.T.to(torch.int32))
        self.register_buffer("scales", scale)
        self.register_buffer("bias", linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.qweight.T * self.scales, self.bias)


LINEARS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao": torchao,
    "fp8": FP8Linear.of,
    "bitsandbytes": Linear4bit.of,
    "awq_gptq": WQLinear,
}


def projections(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear modules inside attention: owner, name, module."""
    return [
        (owner, name, part)
        for owner in model.modules()
        if "Attention" in type(owner).__name__
        for name, part in owner.named_children()
        if type(part) is nn.Linear
    ]


def quantize(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Replace the projections of all attention modules by stand-ins."""
    for owner, name, part in projections(model):
        setattr(owner, name, LINEARS[kind](part))
    return model


def round_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model that computes what a quantized one does."""
    for _, _, part in projections(model):
        codes, scale = _codes(part.weight.data)
        part.weight.data = codes * scale
    return model


class Mxfp4GptOssMLP(nn.Module):
    """As transformers' own: neither router nor experts are called; it returns the router's logits."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.experts = block.router, block.experts

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, self.router.hidden_dim)
        logits = F.linear(flat, self.router.weight, self.router.bias)
        values, indices = logits.topk(self.router.top_k)
        out = type(self.experts).forward(self.experts, flat, indices, values.softmax(-1))
        return out.view(hidden.shape), logits


class FP8Experts(nn.Module):
    """As transformers' own: another class, called as the experts it replaces."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.of = [experts]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.of[0](hidden_states, top_k_index, top_k_weights)


class FusedExperts(FP8Experts):
    """Experts of a kernel with arguments of its own: the router's output tells the choice."""

    def forward(self, x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        return self.of[0](x, ids, scales)


def replace_parts(model: PreTrainedModel, name: str, make: Callable[[Any], nn.Module]) -> None:
    """Replace every child that is called `name` and has parts of an MoE block."""
    for owner in list(model.modules()):
        part = getattr(owner, name, None)
        if name == "experts" and isinstance(part, nn.Module) or hasattr(part, "experts"):
            setattr(owner, name, make(part))
