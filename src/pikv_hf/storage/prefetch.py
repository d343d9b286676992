"""Copies of offloaded pages to an accelerator, block by block, while another block is read."""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Encoded pages [R, H, s, ...], and data that the reader needs with them.
Block = tuple[dict[str, Tensor], Any]

# Bytes of one block; the device holds two blocks at a time.
BLOCK_BYTES = 2**25


def staged(blocks: Iterator[Block], device: torch.device) -> Iterator[Block]:
    """Yield the blocks as copies on `device`.

    If the device has streams, the next block is copied on a side stream while this block is read.
    A block is valid until the next one is requested: its buffer is reused.
    """
    backend: Any = torch.get_device_module(device)
    if not hasattr(backend, "Stream"):
        for fields, data in blocks:
            yield {name: tensor.to(device) for name, tensor in fields.items()}, data
        return
    main, side = backend.current_stream(device), _side_stream(device)
    buffers = itertools.cycle([_Buffer(main, side), _Buffer(main, side)])
    try:
        ahead: tuple[_Buffer, Block] | None = None
        for fields, data in blocks:
            buffer = next(buffers)
            following = buffer, (buffer.fill(fields), data)
            if ahead is not None:
                yield from _read(*ahead)
            ahead = following
        if ahead is not None:
            yield from _read(*ahead)
    finally:
        main.wait_stream(side)  # before the buffers' memory is reused


def _read(buffer: "_Buffer", block: Block) -> Iterator[Block]:
    buffer.main.wait_event(buffer.is_filled)
    yield block
    buffer.is_read.record(buffer.main)


class _Buffer:
    """Memory for one block on the device, written on the stream `side` and read on `main`."""

    def __init__(self, main: Any, side: Any) -> None:
        self.main, self.side = main, side
        self.backend: Any = torch.get_device_module(main.device)
        self.memory: dict[str, Tensor] = {}
        self.is_filled, self.is_read = self.backend.Event(), self.backend.Event()

    def fill(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Start to copy `fields` over the previous block, and return the copies."""
        if all(t.numel() <= len(self.memory.get(name, ())) for name, t in fields.items()):
            self.side.wait_event(self.is_read)
        else:
            device = self.main.device
            for name, tensor in fields.items():
                self.memory[name] = torch.empty(tensor.numel(), dtype=tensor.dtype, device=device)
            # Work queued on `main` may still use memory that the allocator has just handed out.
            self.side.wait_stream(self.main)
        copies = {name: self.memory[name][: t.numel()].view(t.shape) for name, t in fields.items()}
        with self.backend.stream(self.side):
            for name, tensor in fields.items():
                _copy(tensor, copies[name])
        self.is_filled.record(self.side)
        return copies


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy `source` [R, H, s, ...] to `target` in dense parts, which need no temporary copy."""
    if source.is_contiguous():
        target.copy_(source, non_blocking=True)
        return
    for part, new in zip(source.flatten(0, 1), target.flatten(0, 1), strict=True):
        new.copy_(part, non_blocking=True)


@cache
def _side_stream(device: torch.device) -> Any:
    """Return the stream on which pages are copied to `device`."""
    return torch.get_device_module(device).Stream(device)
