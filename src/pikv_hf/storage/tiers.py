"""The kinds of memory that may hold the encoded pages of a layer.

Shapes: R rows, H KV heads, S pages; or N pages of a pool.
"""

import ctypes
import errno
import mmap
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .memory import empty_like, is_on_disk, own
from .prefetch import BLOCK_BYTES, Block, staged
from .room import Room


@dataclass(frozen=True)
class Tier(ABC):
    """Memory for pages that `device` reads, up to `limit` bytes of a layer (None = no limit)."""

    device: torch.device
    limit: int | None = None
    name: ClassVar[str]
    #: True if unused room for more pages takes no memory.
    is_roomy: ClassVar[bool] = False
    #: True if pages are fetched from there to be read by the device.
    is_far: ClassVar[bool] = False
    #: True if the pages are in the memory of another rank.
    is_remote: ClassVar[bool] = False

    @property
    def merges(self) -> bool:
        """True if small stores are merged into larger ones, so that there are few."""
        return self.limit is None and not self.is_roomy

    def room(self, room: Room) -> Room:
        """Return `room`, with unlimited bytes if unused room takes no memory."""
        return replace(room, nbytes=sys.maxsize) if self.is_roomy else room

    @abstractmethod
    def has(self, tensor: Tensor) -> bool:
        """Return True if `tensor` is in memory of this kind."""

    @abstractmethod
    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Allocate unwritten memory of this kind with the dtype of `like`."""

    def hold(self, tensor: Tensor, room: int | None = None) -> Tensor:
        """Return `tensor` [R, H, S, ...] in this tier, in its own storage for `room` pages."""
        if room is None or room == tensor.shape[2]:
            if self.has(tensor):
                return own(tensor)
            return self.empty(tensor, *tensor.shape).copy_(tensor)
        held = self.empty(tensor, *tensor.shape[:2], room, *tensor.shape[3:])
        held.narrow(2, 0, tensor.shape[2]).copy_(tensor)
        return held

    def select(self, tensor: Tensor, index: Tensor) -> Tensor:
        """Copy the entries `index` of the first dimension of `tensor`, within this tier."""
        held = self.empty(tensor, len(index), *tensor.shape[1:])
        return torch.index_select(tensor, 0, index.to(tensor.device), out=held)

    @property
    def in_place(self) -> bool:
        """True if the device reads this memory in place."""
        return True

    def max_pages(self, page_bytes: int) -> int:
        """Return how many pages of `page_bytes` bytes may be copied to the device at a time."""
        return sys.maxsize if self.in_place else max(1, BLOCK_BYTES // max(page_bytes, 1))

    def bring(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy `fields` to the device, if they are not there."""
        return {name: tensor.to(self.device) for name, tensor in fields.items()}

    def blocks(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Yield `blocks` on the device; a block is valid until the next one is requested."""
        return blocks if self.in_place else staged(blocks, self.device)

    def read_ahead(self, tensors: Iterable[Tensor]) -> None:
        """Announce that `tensors` will be read soon."""
        return


@dataclass(frozen=True)
class Near(Tier):
    """The memory of the device on which the layer runs."""

    name: ClassVar[str] = "device"

    def has(self, tensor: Tensor) -> bool:
        return True  # tensors are made or loaded there

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return empty_like(like, shape)


@dataclass(frozen=True)
class Elsewhere(Tier):
    """The memory of another device of this process, which attends to the pages itself."""

    name: ClassVar[str] = "device"

    def has(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=self.device)


@dataclass(frozen=True)
class Remote(Tier):
    """The memory of another rank, which attends to the pages itself: only shapes are known here."""

    name: ClassVar[str] = "ranks"
    is_remote: ClassVar[bool] = True

    def has(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device="meta")


@dataclass(frozen=True)
class Ram(Tier):
    """The CPU's memory, pinned if the layer runs on CUDA."""

    name: ClassVar[str] = "ram"
    is_far: ClassVar[bool] = True

    def has(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and (not self._pins or tensor.is_pinned())

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        if not self._pins and like.device.type == "cpu":
            return empty_like(like, shape)
        return torch.empty(shape, dtype=like.dtype, pin_memory=self._pins)

    @property
    def in_place(self) -> bool:
        return self.device.type == "cpu"

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Disk(Ram):
    """Files in `folder`, mapped into memory; a CPU reads them in place.

    A file is unlinked as soon as it is mapped, so that the system removes it with the last tensor
    that reads it, however the process ends; the folder looks empty. A new file is for half as
    many pages as are held: unused room costs no memory, and the number of files grows with the
    logarithm of the tokens.
    """

    folder: str = ""
    name: ClassVar[str] = "disk"
    is_roomy: ClassVar[bool] = True

    def has(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and (is_on_disk(tensor) or not tensor.numel())

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if not size:
            return torch.empty(shape, dtype=like.dtype)
        try:
            return self._mapped(size, like).view(shape)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if mmap fails
            number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
            raise OSError(
                number or errno.ENOMEM,
                f"`offload_folder` {self.folder!r} cannot hold {size * like.element_size()} more bytes "
                f"of pages: {reason or error}",
            ) from error

    def _mapped(self, size: int, sample: Tensor) -> Tensor:
        file, path = tempfile.mkstemp(".pages", "pikv-", self.folder)
        try:
            if hasattr(os, "posix_fallocate"):  # on a full disk: an error now, no signal later
                os.posix_fallocate(file, 0, size * sample.element_size())
            return torch.from_file(path, shared=True, size=size, dtype=sample.dtype)
        finally:
            os.unlink(path)
            os.close(file)

    def read_ahead(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.numel():
                storage = tensor.untyped_storage()
                place = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
                ctypes.CDLL(None).madvise(*place, mmap.MADV_WILLNEED)
