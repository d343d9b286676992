"""The places that a cache may use: devices that a model runs on, or ranks that share its cache."""

from typing import Any

from ..attach.binding import Binding
from ..model.devices import layer_devices
from ..model.gates import num_experts
from ..model.parallel import Parallelism
from ..placements import DeviceMap, Placement, Sharding
from ..placements.ranks import Ranks
from ..placements.sharding import checked_devices
from ..placements.site import NO_SITE, Site


def site_of(placement: Placement, model: Any, binding: Binding, division: Parallelism) -> Site:
    """Return the places that `placement` deals the pages of `model`, so divided, to.

    Raises:
        ValueError: there is one place only, or pages cannot be dealt to so many.
    """
    if not isinstance(placement, Sharding):
        return NO_SITE
    if isinstance(placement, DeviceMap):
        total = model.config.get_text_config(decoder=True).num_hidden_layers
        without = binding.attention.keys() - binding.gate_of.keys()
        experts = num_experts(model.config) if binding.gate_of else None
        of_layers = {idx: None if idx in without else experts for idx in range(total)}
        return placement.site(sorted(binding.attention), of_layers)
    ranks = ranks_of(placement, division)
    if ranks is not None:
        owns = division.experts is not None
        site = Site(exchange=ranks, rank=ranks.rank, size=ranks.size, owns_experts=owns)
    elif placement.devices is not None:
        site = Site(devices=checked_devices(placement.devices))
    else:
        found = dict.fromkeys(layer_devices(binding.attention, model).values())
        site = Site(devices=checked_devices(found))
    if site.count < 2:
        where = "`process_group` has one rank"
        if ranks is None:
            names = ", ".join(map(str, site.devices)) or "no device"
            where = f"the attention of the model runs on {names} in one process"
        raise ValueError(
            f"`placement` is {placement}, but there is nothing to spread over: {where}. Give "
            "`devices` or `process_group`, load the model with a `device_map`, or start it with "
            "torchrun."
        )
    placement.check(site.count)
    return site


def ranks_of(placement: Placement, division: Parallelism) -> Ranks | None:
    """Return the ranks that share the cache of a model; None = this process alone.

    Raises:
        ValueError: ranks read different batches, or run other heads or layers.
    """
    if not isinstance(placement, Sharding) or isinstance(placement, DeviceMap):
        return None
    group = None
    if placement.devices is None and division != Parallelism():
        group = division.sharing_group(placement)
    group = placement.process_group or group
    return None if group is None else Ranks.of(group)
