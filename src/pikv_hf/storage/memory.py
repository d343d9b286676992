"""Properties of the memory behind tensors, and allocation of new memory."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

LARGE = 2**22  # bytes


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `numbers` as an int64 tensor [n] on `device`, uploaded once for all layers."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def is_writable(tensor: Tensor) -> bool:
    """Return False for a tensor of `torch.inference_mode` while that mode is off."""
    return not tensor.is_inference() or torch.is_inference_mode_enabled()


def is_on_disk(tensor: Tensor) -> bool:
    """Return True if the memory is a mapped file, which the system may drop and read again."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each storage behind `tensors` by address.

    Mapped files, and shapes of what other ranks hold, are left out.
    """
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if not (t.is_meta or is_on_disk(t))
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all storages behind `tensors`, each once, as `storages` counts them."""
    return sum(storages(tensors).values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and values of dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def trim_heap() -> None:
    """Give the free holes between allocated blocks back to the system.

    Encoding leaves such holes; glibc keeps them, and can rarely use them for later temporaries.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
        if trim is not None:
            trim(0)


def is_own(tensor: Tensor) -> bool:
    """Return True if `tensor` is dense and alone in its storage."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()


def own(tensor: Tensor) -> Tensor:
    """Return `tensor`, copied if it is not dense or would keep a larger storage alive."""
    return tensor if is_own(tensor) else empty_like(tensor).copy_(tensor)


def empty_like(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Allocate an unwritten dense tensor like `tensor`, of `shape` if that is given.

    On Linux a large tensor on the CPU is placed in huge pages, if the system has any: the first
    write is then several times as fast.
    """
    new = tensor.new_empty(tensor.shape if shape is None else shape)
    size = new.untyped_storage().nbytes()
    if sys.platform == "linux" and new.device.type == "cpu" and size >= LARGE:
        start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (new.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        place = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        ctypes.CDLL(None).madvise(*place, mmap.MADV_HUGEPAGE)  # advice: failure does no harm
    return new
