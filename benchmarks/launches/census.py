"""What an accelerator would be asked to do: kernels, synchronizations, uploads, bytes, all counted.

Import this module before a model is built. It registers the logical accelerator of `tests/fakegpu.py`,
with CUDA's fused attention of `tests/fakecuda.py`, and puts the folders of both on the path, so that
scripts find `common` and `fakegpu`.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import fakecuda  # noqa: F401 - first: fused attention as on CUDA
import fakegpu
import torch
import torch.nn.functional as F
from fakegpu import FakeGpuTensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("fakegpu", 0)

# ATen operators that run several kernels on CUDA; all others that compute something run one.
# `logsumexp`: amax, abs, eq, masked_fill_, sub, exp_, sum, log_, add_. Padding and `masked_fill` copy
# and then fill. `topk` selects and sorts; a sort has passes, whose number depends on the size.
KERNELS = {
    "logsumexp": 9,
    "constant_pad_nd": 2,
    "masked_fill": 2,
    "topk": 2,
    "sort": 4,
    "argsort": 4,
}
# How often `logsumexp` reads or writes a tensor of its argument's size: amax, sub, exp_, sum.
PASSES = {"logsumexp": 6}

# Operators that allocate, or that change what is known of a tensor; views are found by themselves.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "resize_",
    "set_",
    "is_same_size",
}
# Operators whose result, or its size, the host has to know.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "equal",
    "repeat_interleave",
}
COPIES = {"_to_copy", "copy_", "_copy_from"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
# Where a source file begins in the path of an installed or checked out package.
SOURCES = ("/src/", "/torch-ext/", "/site-packages/")


class Event(NamedTuple):
    """A kernel, a synchronization ("sync") or an upload of operator `name`.

    `place` is the name of the innermost module that runs, as far as `in_places` was asked to see it;
    `site` is the line that asked for the event, of pikv_hf if any of its lines is on the stack.
    """

    what: str
    name: str
    place: str
    site: str


class Census(TorchDispatchMode):
    """Counts what tensors on the logical accelerator cause while the mode is on.

    A custom operator counts as one kernel, whatever it does inside. An upload from memory that is
    not pinned makes the host wait, too; it is counted as an upload alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[Event] = Counter()
        self.nbytes = 0
        self.places = [""]

    def count(self, what: str, under: str = "") -> int:
        """Return the number of events of one kind in modules whose name starts with `under`."""
        return sum(
            number
            for event, number in self.events.items()
            if event.what == what and event.place.startswith(under)
        )

    def sites(self, what: str) -> Counter[str]:
        """Return the number of events of one kind by the line that asked for them."""
        counts: Counter[str] = Counter()
        for event, number in self.events.items():
            if event.what == what:
                counts[event.site] += number
        return counts

    @contextmanager
    def in_places(self, model: nn.Module) -> Iterator[None]:
        """Note in which decoder layer, and whether in its attention, events happen."""
        handles = []
        for name, module in model.named_modules():
            *_, parent, last = f"..{name}".split(".")
            if parent == "layers" or last == "self_attn":
                handles.append(module.register_forward_pre_hook(self._enter(f"{name}.")))
                handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, place: str) -> Any:
        return lambda *_: self.places.append(place)

    def _leave(self, *_: Any) -> None:
        self.places.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, inputs = func._schema.name.removeprefix("aten::"), tensors((args, kwargs))
        outputs = tensors(out)
        if not any(map(is_on_device, inputs + outputs)):
            return out
        if name == "lift_fresh":  # the last step of `torch.tensor(..., device=...)`
            self._note("upload", "tensor")
        if func.is_view or name in FREE:
            return out
        if name in COPIES:
            # Of a copy the source is the first argument, of a copy in place the second.
            source, target = (args[1], args[0]) if name == "copy_" else (inputs[0], outputs[0])
            if is_on_device(source) != is_on_device(target):
                if is_on_device(target):
                    self._note("upload", name)
                elif not kwargs.get("non_blocking"):  # else it is copied while the host goes on
                    self._note("sync", name)
                return out
        if name in WAITING:
            self._note("sync", name)
        if name in INDEXING:
            self._note_indices([index for index in args[1] if isinstance(index, Tensor)], name)
        if name != "_local_scalar_dense":
            self._note("kernel", name, KERNELS.get(name, 1))
            self.nbytes += PASSES.get(name, 1) * sum(map(touched_bytes, inputs))
            self.nbytes += sum(map(touched_bytes, outputs))
        return out

    def _note(self, what: str, name: str, number: int = 1) -> None:
        self.events[Event(what, name, self.places[-1], site(sys._getframe(2)))] += number

    def _note_indices(self, indices: list[Tensor], name: str) -> None:
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8):
                self._note("sync", f"{name} by bool")
            if not is_on_device(index):
                self._note("upload", f"{name} by indices of the CPU")


def is_on_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeGpuTensor)


def on_device(tensor: Tensor) -> Tensor:
    """Return `tensor` on the logical accelerator; nothing is counted."""
    return FakeGpuTensor(tensor, DEVICE)


def model_on_device(model: nn.Module) -> None:
    """Move all weights of `model` to the logical accelerator, in place."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({k: on_device(t.data) for k, t in held.items() if t is not None})


def address(tensor: Tensor) -> int:
    """Return the address of the first element of a tensor, also of one on the accelerator."""
    return fakegpu.unwrap(tensor).data_ptr()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def touched_bytes(tensor: Tensor) -> int:
    """Return the bytes of the different elements of a tensor: expanded ones are read once."""
    lengths = [
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n
    ]
    return torch.Size(lengths).numel() * tensor.element_size()


def site(frame: FrameType | None) -> str:
    """Return file and line of the innermost frame of pikv_hf, else of transformers."""
    other = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/pikv_hf/" in path or "/pikv_kernels/" in path:
            return f"{short(path)}:{frame.f_lineno}"
        if not other and "/transformers/" in path:
            other = f"{short(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return other


def short(path: str) -> str:
    for source in SOURCES:
        path = path.rpartition(source)[2]
    return path


@torch.library.custom_op("launches::fused_attention", mutates_args=())
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Compute torch's attention on the CPU, as one operator."""
    return SDPA(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    ).contiguous()


SDPA = F.scaled_dot_product_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute torch's attention; on the logical accelerator it is one kernel, as on CUDA."""
    assert not dropout_p, "models are in eval mode"
    return fused_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)


F.scaled_dot_product_attention = attention  # torch has no such kernel for a logical accelerator
