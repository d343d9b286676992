"""Near memory first, then the CPU's, then files."""

import os
from dataclasses import dataclass

import torch

from ..storage.tiers import Disk, Near, Ram, Tier
from ..validation import parse_bytes
from .local import Local


@dataclass(frozen=True)
class Offload(Local):
    """Pages beyond `device_bytes` live in the CPU's memory, and beyond `ram_bytes` on disk.

    Each layer has an equal part of both amounts (bytes, or text such as "2GiB"), so that what has to
    be copied is spread over a forward pass. They count the encoded keys and values of sealed pages,
    with the room made for more; open tokens (`window`), positions and labels stay on the layer's
    device. `offload_folder` is a folder that exists, on a disk of its own speed; pages lie there in
    mapped files that have no name and vanish with the pages, the cache or the process.

    The tiers are those of FlexGen (Sheng et al., arXiv 2303.06865), whose policy is shares, too: a
    decode step reads every page, so only how many are near matters, not which. A page stays where
    it was put when it was sealed. Fetching it when it is read, as LRU does (with everything read,
    LRU is FIFO), would find none near: each is given up before its turn comes again.

    Far pages are read block by block: copied to an accelerator from pinned memory, the next block
    while attention reads this one; in place by a CPU, for which the files of the next layer are read
    ahead. On a CPU `device_bytes` and `ram_bytes` are the same memory.
    """

    device_bytes: int | str = 0
    ram_bytes: int | str | None = None
    offload_folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "ram_bytes"):
            if (name, getattr(self, name)) != ("ram_bytes", None):
                _bytes(name, getattr(self, name))
        folder = self.offload_folder
        if (folder is None) != (self.ram_bytes is None):
            raise ValueError(
                f"`ram_bytes` is {self.ram_bytes!r} and `offload_folder` is {folder!r}; pages on disk "
                "need both: the bytes that stay in memory, and a folder for the rest."
            )
        if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise ValueError(
                f"`offload_folder` is {str(folder)!r}; it must be a folder that exists and can be "
                "written to."
            )

    @property
    def reads_ahead(self) -> bool:
        return self.offload_folder is not None

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        near = Near(device, _bytes("device_bytes", self.device_bytes) // layers)
        if self.ram_bytes is None or self.offload_folder is None:
            return [near, Ram(device)]
        ram = Ram(device, _bytes("ram_bytes", self.ram_bytes) // layers)
        return [near, ram, Disk(device, folder=os.fspath(self.offload_folder))]


def _bytes(name: str, given: int | str) -> int:
    nbytes = parse_bytes(given) if isinstance(given, str) else given
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        raise ValueError(
            f"`{name}` is {given!r}; it must be a number of bytes, 0 or more, or text such as '2GiB'."
        )
    return nbytes
