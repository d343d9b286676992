"""Blocks of far pages brought to an accelerator, each while the one before is being read."""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Encoded pages [R, H, s, ...], and what the reader wants to know of them.
Block = tuple[dict[str, Tensor], Any]

# Bytes of one block; two of them stand on the device at a time.
BLOCK_BYTES = 2**25


def staged(blocks: Iterator[Block], device: torch.device) -> Iterator[Block]:
    """The blocks, copied to `device` one after the other.

    Where the device has streams, the next block is copied on a stream of its own while this one is
    read. A copy is good until the next one is asked for.
    """
    backend: Any = torch.get_device_module(device)
    if not hasattr(backend, "Stream"):
        for fields, what in blocks:
            yield {name: tensor.to(device) for name, tensor in fields.items()}, what
        return
    main, side = backend.current_stream(device), _side_stream(device)
    buffers = itertools.cycle([_Buffer(main, side), _Buffer(main, side)])
    try:
        ahead: tuple[_Buffer, Block] | None = None
        for fields, what in blocks:
            buffer = next(buffers)
            coming = buffer, (buffer.fill(fields), what)
            if ahead is not None:
                yield from _read(*ahead)
            ahead = coming
        if ahead is not None:
            yield from _read(*ahead)
    finally:
        main.wait_stream(side)  # before the buffers' memory serves another


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
        """A copy of `fields`, which is on its way here; it replaces what was here."""
        if all(t.numel() <= len(self.memory.get(name, ())) for name, t in fields.items()):
            self.side.wait_event(self.is_read)
        else:
            device = self.main.device
            for name, tensor in fields.items():
                self.memory[name] = torch.empty(tensor.numel(), dtype=tensor.dtype, device=device)
            # Whoever had this memory before, on the stream where it was made, has done with it.
            self.side.wait_stream(self.main)
        copies = {name: self.memory[name][: t.numel()].view(t.shape) for name, t in fields.items()}
        with self.backend.stream(self.side):
            for name, tensor in fields.items():
                _copy(tensor, copies[name])
        self.is_filled.record(self.side)
        return copies


def _copy(source: Tensor, target: Tensor) -> None:
    """Write `source` [R, H, s, ...] to `target`: in parts that are dense, which go without a detour."""
    if source.is_contiguous():
        target.copy_(source, non_blocking=True)
        return
    for part, new in zip(source.flatten(0, 1), target.flatten(0, 1), strict=True):
        new.copy_(part, non_blocking=True)


@cache
def _side_stream(device: torch.device) -> Any:
    """The stream on which pages come to `device`."""
    return torch.get_device_module(device).Stream(device)
