"""A plan that spreads the weights of a model and its KV cache over devices."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import get_max_memory
from transformers import PreTrainedModel

from ..model.blocks import Block, blocks
from ..model.wrappers import unwrap
from ..placements.kv_device_map import runs
from ..validation import check_bytes, check_count
from .partition import lacking, partition
from .planned_bytes import planned_bytes

Device = int | str
GIB = 2**30
# The share of the free memory that is planned with if `max_memory` is not given, as in accelerate.
USABLE = 0.9


@dataclass(frozen=True)
class DeviceLoad:
    """What a plan puts on one device: names of modules, cache layers, and bytes of both kinds."""

    device: Device
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    weight_bytes: int
    kv_bytes: int
    max_bytes: int

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class DevicePlan:
    """The loads of all devices, in the order of the layers."""

    loads: tuple[DeviceLoad, ...]

    @property
    def device_map(self) -> dict[str, Device]:
        """The devices of modules, for `from_pretrained` and accelerate's `dispatch_model`."""
        if sum(bool(load.modules) for load in self.loads) == 1:
            return {"": next(load.device for load in self.loads if load.modules)}
        return {name: load.device for load in self.loads for name in load.modules}

    @property
    def kv_device_map(self) -> dict[str, Device]:
        """The devices where layers run and cache, with keys such as "layers.0-11"."""
        return {
            f"layers.{first}-{last}" if first < last else f"layers.{first}": load.device
            for load in self.loads
            for first, last in runs(load.layers)
        }


def infer_kv_device_map(
    model: Any,
    max_memory: Mapping[Device, int | str] | None = None,
    *,
    max_cache_len: int,
    batch_size: int = 1,
    no_split_module_classes: Collection[str] | None = None,
    **settings: Any,
) -> tuple[dict[str, Device], dict[str, Device]]:
    """Return a `device_map` and a `kv_device_map` with room for the weights and the KV cache.

    As `infer_auto_device_map` and `get_balanced_memory` of accelerate, but the keys and values of
    each layer count with the weights of its device, and are evenly spread:

    ```python
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    device_map, kv_device_map = infer_kv_device_map(
        model, {0: "80GiB", 1: "80GiB"}, max_cache_len=131072, compressor="int4"
    )
    model = AutoModelForCausalLM.from_pretrained(name, device_map=device_map)
    ```

    Args:
        model: the model, with or without weights (on the meta device), in the dtype that it will be
            loaded in.
        max_memory: bytes of each device, as in accelerate: the keys are numbers of accelerators,
            "mps" or "cpu". Nothing is offloaded: "cpu" is used only if there is nothing else, and
            "disk" never. None = 90 % of the free memory of the devices that are here.
        max_cache_len: tokens of each row that the cache will hold, prompt and answer.
        batch_size: rows of the cache.
        no_split_module_classes: names of classes of modules that stay on one device; None = the
            classes that the model names.
        settings: arguments of `PiKVCache`, such as `scheduler`, `budget` or `compressor`. The bytes
            are counted as `planned_bytes` says.

    Raises:
        ValueError: the model and its cache do not fit; the message says how much is missing.
    """
    plan = plan_devices(
        model,
        max_memory,
        max_cache_len=max_cache_len,
        batch_size=batch_size,
        no_split_module_classes=no_split_module_classes,
        **settings,
    )
    return plan.device_map, plan.kv_device_map


def plan_devices(
    model: Any,
    max_memory: Mapping[Device, int | str] | None = None,
    *,
    max_cache_len: int,
    batch_size: int = 1,
    no_split_module_classes: Collection[str] | None = None,
    **settings: Any,
) -> DevicePlan:
    """Return the plan of which `infer_kv_device_map` returns the maps."""
    check_count("max_cache_len", max_cache_len)
    check_count("batch_size", batch_size)
    limits = _limits(max_memory)
    model = unwrap(model)
    parts = blocks(model, no_split_module_classes)
    kv = _kv_of_blocks(model, parts, max_cache_len, batch_size, settings)
    weights = [block.nbytes for block in parts]
    _check_fit(weights, kv, limits)
    ends = partition(weights, kv, [*limits.values()])
    loads = []
    for (device, limit), start, end in zip(limits.items(), [0, *ends], ends, strict=False):
        held = parts[start:end]
        loads.append(
            DeviceLoad(
                device,
                tuple(name for block in held for name in block.names),
                tuple(sorted({layer for block in held for layer in block.layers})),
                sum(weights[start:end]),
                sum(kv[start:end]),
                limit,
            )
        )
    return DevicePlan(tuple(loads))


def _kv_of_blocks(
    model: PreTrainedModel,
    parts: Sequence[Block],
    max_cache_len: int,
    batch_size: int,
    settings: dict[str, Any],
) -> list[int]:
    """Return the bytes of the cache layers of each block; token ids are beside the embedding."""
    planned = planned_bytes(model, max_cache_len, batch_size, **settings)
    owner = {layer: number for number, block in enumerate(parts) for layer in block.layers}
    kv = [planned.ids, *[0] * (len(parts) - 1)]
    for layer, nbytes in planned.layers.items():
        kv[owner.get(layer, len(parts) - 1)] += nbytes
    return kv


def _check_fit(weights: list[int], kv: list[int], limits: dict[Device, int]) -> None:
    missing = lacking([a + b for a, b in zip(weights, kv, strict=True)], [*limits.values()])
    if missing:
        raise ValueError(
            f"`max_memory` is {sum(limits.values()) / GIB:.2f} GiB on {len(limits)} devices, but weights "
            f"of {sum(weights) / GIB:.2f} GiB and a cache of {sum(kv) / GIB:.2f} GiB do not fit: each "
            f"device lacks {missing / GIB:.2f} GiB. Give more memory, more devices, or a smaller cache "
            "(`budget`, `compressor`, `max_cache_len`, `batch_size`)."
        )


def _limits(max_memory: Mapping[Device, int | str] | None) -> dict[Device, int]:
    """Return the bytes to plan with of each device, in order."""
    if max_memory is None:
        given = {key: int(USABLE * nbytes) for key, nbytes in get_max_memory().items()}
    else:
        given = {k: check_bytes(f"max_memory[{k!r}]", v) for k, v in max_memory.items()}
    known = (*sorted(key for key in given if isinstance(key, int)), "mps", "cpu", "disk")
    strange = [key for key in given if key not in known]
    if strange:
        raise ValueError(
            f"`max_memory` has the key {strange[0]!r}; a key must be the number of an accelerator, "
            "'mps', 'cpu' or 'disk'."
        )
    limits = {key: given[key] for key in known if given.get(key) and key != "disk"}
    if len(limits) > 1:
        limits.pop("cpu", None)
    if not limits:
        raise ValueError(
            f"`max_memory` is {max_memory!r}; it must give bytes to an accelerator or to 'cpu'."
        )
    return limits
