"""How a loaded model is divided over the processes of a launch, its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .gates import num_experts
from .modules import attention_modules
from .wrappers import unwrap

# Dims of device meshes along which ranks read batches of their own, as transformers names them.
DATA_DIMS = ("fsdp", "dp_replicate", "efsdp")


@dataclass(frozen=True)
class Parallelism:
    """The part of a model that this rank runs, and the ranks that run it on the same batch.

    Attributes:
        tp, ep, pp, dp: ranks that divide matrices, experts and layers; ranks that divide the data.
        shards_heads: the attention heads of a layer are divided over ranks.
        shares_batch: False if every rank reads a batch of its own, as far as the model tells.
        group: ranks that run the same layers on the same batch, each with all attention heads; all
            ranks of the launch if the model is not divided. None = there are no such ranks.
        experts: the experts whose weights this rank holds; None = all.
        layers: the decoder layers that this rank runs; None = all.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    shards_heads: bool = False
    shares_batch: bool = True
    group: dist.ProcessGroup | None = None
    experts: range | None = None
    layers: range | None = None

    def sharing_group(self, placement: Any) -> dist.ProcessGroup:
        """Return the ranks that can share one cache, as `placement` asks for.

        Raises:
            ValueError: no ranks can: each has another batch, other heads or other layers.
        """
        if self.group is not None:
            return self.group
        if self.shards_heads:
            why = (
                f"the attention heads of the model are divided over {self.tp} ranks, so that each has "
                "a part of the cache already"
            )
        elif not self.shares_batch:
            why = (
                f"{self.dp} ranks read different batches (DistributedDataParallel or FSDP), so that "
                "each needs a cache of its own"
            )
        elif self.pp > 1:
            why = f"each of {self.pp} ranks runs other layers (pipeline parallelism)"
        else:
            why = (
                "this process is the only rank: start several with torchrun, and call "
                "`torch.distributed.init_process_group` or load the model with a DistributedConfig"
            )
        raise ValueError(
            f"`placement` is {placement}, which divides a cache over ranks that read the same batch "
            f"with all attention heads, but {why}."
        )


def parallelism(model: Any) -> Parallelism:
    """Return how `model` is divided, by what torch and transformers have left on it.

    `model` may be wrapped, as `PiKVCache` accepts it. Of a model that is not divided, in a launch
    of several ranks, nothing tells whether the ranks read the same batch.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return Parallelism()
    if isinstance(model, DistributedDataParallel):
        return Parallelism(dp=world, shares_batch=False)
    inner = unwrap(model)
    mesh = getattr(inner, "_device_mesh", None)
    if mesh is not None:
        return _of_transformers(inner, mesh)
    if _is_fsdp(inner):
        return Parallelism(dp=world, shares_batch=False)
    if _shards_heads(inner):
        return Parallelism(tp=world, shards_heads=True)
    return Parallelism(group=dist.group.WORLD)


def _of_transformers(model: Any, mesh: Any) -> Parallelism:
    """Return what a `DistributedConfig` has made of `model`, whose dense layers lie on `mesh`."""
    config = model.config.distributed_config
    tp, pp, data = config.tp_size, config.pp_size, config.fsdp_size
    dp = data * getattr(config, "dp_replicate_size", 1)
    # Before 5.20 experts are divided over the ranks of tensor parallelism, if a flag says so.
    ep = getattr(config, "ep_size", tp if config.enable_expert_parallel else 1)
    tp_mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    ep_mesh = model._mesh_manager.get_mesh("ep") if hasattr(model, "_mesh_manager") else tp_mesh
    shards_heads, experts, layers = _shards_heads(model), None, None
    if ep > 1:
        own = num_experts(model.config) // ep
        first = own * ep_mesh.get_local_rank()
        experts = range(first, first + own)
    if pp > 1:
        stage = model._pp_stage
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        layers = range(*stage.layer_range_for_rank(stage.pp_rank, count))
    return Parallelism(
        tp=tp,
        ep=ep,
        pp=pp,
        dp=dp,
        shards_heads=shards_heads,
        shares_batch=dp == 1 or tp > 1,
        group=tp_mesh.get_group() if tp > 1 and not shards_heads else None,
        experts=experts,
        layers=layers,
    )


def _is_fsdp(model: PreTrainedModel) -> bool:
    """Return whether `torch.distributed.fsdp.fully_shard` was applied to a part of `model`."""
    from torch.distributed.fsdp import FSDPModule  # some builds of torch have none

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _shards_heads(model: PreTrainedModel) -> bool:
    """Return whether a weight of an attention module is divided, and not only to save memory."""
    modules = (module for found in attention_modules(model).values() for module in found)
    return any(_is_divided(weight) for module in modules for weight in module.parameters())


def _is_divided(weight: Tensor) -> bool:
    """Return whether ranks compute with parts of `weight`; FSDP gathers it before it is used."""
    from torch.distributed.tensor import DTensor  # some builds of torch have none

    if not isinstance(weight, DTensor):
        return False
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or [None] * mesh.ndim
    dims = zip(names, weight.placements, mesh.shape, strict=True)
    return any(
        size > 1 and name not in DATA_DIMS and not placement.is_replicate()
        for name, placement, size in dims
    )
