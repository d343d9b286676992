"""Pages in the memory of their layer's device first, then in the CPU's, then in files."""

import os
from dataclasses import dataclass

import torch

from ..storage.tiers import Disk, Near, Ram, Tier
from ..validation import check_bytes, resolve
from .local import Local
from .residency import RESIDENCIES, Residency


@dataclass(frozen=True)
class Offload(Local):
    """Keeps pages beyond `device_bytes` in the CPU's memory, and beyond `ram_bytes` on disk.

    Each layer has an equal part of both amounts (bytes, or text such as "2GiB"), so that copies are
    spread over a forward pass. The amounts count the encoded keys and values of sealed pages, with
    the room made for more. Tail tokens (`window`), positions and labels are always on the layer's
    device. `offload_folder` must exist, and its disk sets the speed. Its files are mapped and have
    no names; they vanish with the pages, the cache or the process.

    The tiers are those of FlexGen (Sheng et al., arXiv 2303.06865), which also fixes a share for
    each: a decode step reads every page, so only the number of pages on the device matters. A page
    is never moved once it is sealed, and without a router moving pages to the device when they are
    read would not help: each would leave the device before it is read again.

    With a router that selects pages, only the selected pages are read. With `residency` the device
    keeps copies of pages that were read lately, in `device_bytes`, instead of the first pages of the
    text: "lru", "lru_plus" or "belady", or a `Residency`. Copies are kept of pages of the full size
    in batches whose rows hold equally many, if each KV head has room for all pages that it reads.

    Other pages are read block by block. An accelerator copies them from pinned memory, the next
    block while attention reads the current one. A CPU reads them in place; files of the next layer
    are read ahead. On a CPU `device_bytes` and `ram_bytes` are the same memory.
    """

    device_bytes: int | str = 0
    ram_bytes: int | str | None = None
    offload_folder: str | os.PathLike[str] | None = None
    residency: str | Residency | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "ram_bytes"):
            if (name, getattr(self, name)) != ("ram_bytes", None):
                check_bytes(name, getattr(self, name))
        residency = resolve("residency", self.residency, RESIDENCIES, Residency)
        object.__setattr__(self, "residency", residency)
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

    def copies(self, layers: int) -> tuple[Residency, int] | None:
        if not isinstance(self.residency, Residency):
            return None
        return self.residency, check_bytes("device_bytes", self.device_bytes) // layers

    def tiers(self, device: torch.device, layers: int) -> list[Tier]:
        # Copies take the place of pages on the device.
        near_bytes = 0 if self.residency else check_bytes("device_bytes", self.device_bytes)
        near = Near(device, near_bytes // layers)
        if self.ram_bytes is None or self.offload_folder is None:
            return [near, Ram(device)]
        ram = Ram(device, check_bytes("ram_bytes", self.ram_bytes) // layers)
        return [near, ram, Disk(device, folder=os.fspath(self.offload_folder))]
