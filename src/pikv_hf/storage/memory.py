"""Questions about the memory behind a tensor, and new memory."""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

LARGE = 2**22  # bytes


def is_writable(tensor: Tensor) -> bool:
    """Tensors made under `torch.inference_mode` cannot be written outside of it."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def is_on_disk(tensor: Tensor) -> bool:
    """Whether its memory is a mapped file, which the system reads as needed and may drop again."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages behind `tensors`, less files, by their addresses."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if not is_on_disk(t)
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`, less files."""
    return sum(storages(tensors).values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among nested lists, tuples and values of dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def trim_heap() -> None:
    """Give memory that is free between blocks in use back to the system.

    Encoding leaves such holes, which glibc keeps, and mostly cannot use for its next temporaries.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
        if trim is not None:
            trim(0)


def is_own(tensor: Tensor) -> bool:
    """Whether it is dense and alone in its storage."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()


def own(tensor: Tensor) -> Tensor:
    """`tensor`, dense and alone in its storage, so that nothing larger is kept alive by it."""
    return tensor if is_own(tensor) else empty_like(tensor).copy_(tensor)


def empty_like(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Unwritten memory for a dense tensor of `shape` (or its own) with the dtype of `tensor`.

    On Linux a large one on the CPU stands in huge pages, if the system has any: the kernel finds and
    clears those several times as fast when they are first written.
    """
    new = tensor.new_empty(tensor.shape if shape is None else shape)
    size = new.untyped_storage().nbytes()
    if sys.platform == "linux" and new.device.type == "cpu" and size >= LARGE:
        start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (new.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        place = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        ctypes.CDLL(None).madvise(*place, mmap.MADV_HUGEPAGE)  # whether or not it is heeded
    return new
