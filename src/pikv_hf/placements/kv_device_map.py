"""Reads `kv_device_map`, which names the devices of cached keys and values as accelerate does."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FORMS = (
    "'', 'layers', 'layers.3', 'layers.0-11', 'layers.3.experts.0' or 'layers.0-11.experts.0-31', "
    "with or without 'model.' in front"
)
_RANGE = r"(\d+)(?:-(\d+))?"
_KEY = re.compile(rf"(?:\w+\.)*layers(?:\.{_RANGE}(?:\.\w+)?(?:\.experts\.{_RANGE})?)?")
_NO_EXPERTS = re.compile(rf"(?:\w+\.)*layers(?:\.{_RANGE})?")
ALL = range(2**31)


@dataclass(frozen=True)
class LayerDevices:
    """The device of a layer, and of each of its experts; None = experts have no devices."""

    device: torch.device
    of_experts: tuple[torch.device, ...] | None


@dataclass(frozen=True)
class _Entry:
    """A key with its device: `layers`, and `experts` of them; None = the layers themselves.

    `level`: 0 for everything, 1 for all layers, 2 for some.
    """

    key: str
    device: torch.device
    level: int
    layers: range
    experts: range | None

    def is_narrower(self, other: "_Entry") -> bool:
        """Return True if this key is more specific than `other`, and nowhere wider."""
        if self.level != other.level:
            return self.level > other.level
        mine, others = self._widths(), other._widths()
        return mine != others and all(a <= b for a, b in zip(mine, others, strict=True))

    def _widths(self) -> tuple[int, int]:
        return len(self.layers), len(self.experts or ())


def device_of_layers(
    kv_device_map: Mapping[str, int | str | torch.device],
    layers: Sequence[int],
    num_experts: Mapping[int, int | None],
) -> dict[int, LayerDevices]:
    """Return the devices that `kv_device_map` gives to each of `layers` and to its experts.

    Keys are prefixes of modules, as in a `device_map` of accelerate, and layers and experts may be
    ranges whose ends are included. The most specific key counts: of an expert, one that names
    experts, else the device of its layer; then one that names layers; of two such keys, the one
    with the narrower ranges.

    Args:
        kv_device_map: keys such as `{"layers.0-11": 0, "layers.12.experts.0-31": "cuda:1", "": "cpu"}`.
        layers: the layers whose devices are wanted.
        num_experts: the number of experts of every layer of the model; None = it has none.

    Raises:
        TypeError: `kv_device_map` is no mapping.
        ValueError: a key is not understood, or names layers or experts that the model does not have;
            a device does not exist; a layer has no device, or two.
    """
    check_mapping(kv_device_map)
    entries = [_parse(key, device) for key, device in kv_device_map.items()]
    known = {*layers, *num_experts}
    for entry in entries:
        _check(entry, known, num_experts)
    own, uncovered = {}, []
    for layer in layers:
        device = _best([e for e in entries if e.experts is None and layer in e.layers], layer)
        if device is None:
            uncovered.append(layer)
        else:
            own[layer] = device
    if uncovered:
        raise ValueError(
            f"`kv_device_map` has the keys {[*kv_device_map]}, which give no device to the layers "
            f"{uncovered}: add keys for them, or '' for all others."
        )
    return {
        layer: LayerDevices(device, _of_experts(entries, layer, device, num_experts.get(layer)))
        for layer, device in own.items()
    }


def check_mapping(given: Any) -> None:
    """Raise TypeError unless `kv_device_map` is a mapping."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`kv_device_map` is a {type(given).__name__}; it must be a mapping of keys, such "
            "as 'layers.0-11', to devices."
        )


def _of_experts(
    entries: list[_Entry], layer: int, device: torch.device, count: int | None
) -> tuple[torch.device, ...] | None:
    matching = [e for e in entries if e.experts is not None and layer in e.layers]
    if not matching or count is None:
        return None
    found = []
    for expert in range(count):
        of_expert = [e for e in matching if e.experts is not None and expert in e.experts]
        found.append(_best(of_expert, layer) or device)
    return tuple(found)


def _best(entries: list[_Entry], layer: int) -> torch.device | None:
    """Return the device of the most specific of `entries`, all of which match `layer`."""
    best = [e for e in entries if not any(other.is_narrower(e) for other in entries)]
    if len({entry.device for entry in best}) > 1:
        keys = [entry.key for entry in best]
        raise ValueError(
            f"`kv_device_map` has the keys {keys}, which are equally specific and give layer {layer} "
            "different devices: make their ranges disjoint."
        )
    return best[0].device if best else None


def _parse(key: Any, device: Any) -> _Entry:
    if key == "":
        return _Entry("", _device(key, device), 0, ALL, None)
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None or (match[3] is None and not _NO_EXPERTS.fullmatch(key)):
        raise ValueError(f"`kv_device_map` has the key {key!r}; a key must be {FORMS}.")
    layers, experts = _range(match[1], match[2]), _range(match[3], match[4])
    if layers == range(0) or experts == range(0):
        raise ValueError(
            f"`kv_device_map` has the key {key!r}, whose range ends before it begins; a key must be "
            f"{FORMS}."
        )
    where, level = _device(key, device), 1 if layers is None else 2
    return _Entry(key, where, level, ALL if layers is None else layers, experts)


def _range(first: str | None, last: str | None) -> range | None:
    """Return the numbers of a range, whose end is included; `range(0)` if there are none."""
    if first is None:
        return None
    return range(int(first), int(first if last is None else last) + 1) or range(0)


def _check(entry: _Entry, known: set[int], num_experts: Mapping[int, int | None]) -> None:
    """Refuse a key that names layers or experts that the model does not have."""
    if entry.layers is ALL:
        return
    if entry.layers[-1] > max(known, default=-1) or not known.issuperset(entry.layers):
        raise ValueError(
            f"`kv_device_map` has the key {entry.key!r}, but the layers of the model are "
            f"{', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs(known))}."
        )
    for layer in entry.layers if entry.experts is not None else ():
        count = num_experts.get(layer)
        if count is None:
            raise ValueError(
                f"`kv_device_map` has the key {entry.key!r}, but layer {layer} has no experts."
            )
        if entry.experts is not None and entry.experts[-1] >= count:
            raise ValueError(
                f"`kv_device_map` has the key {entry.key!r}, but the experts of layer {layer} are 0 to "
                f"{count - 1}."
            )


def runs(numbers: Collection[int]) -> list[tuple[int, int]]:
    """Return the first and the last number of each run of consecutive `numbers`."""
    firsts = [n for n in sorted(numbers) if n - 1 not in numbers]
    lasts = [n for n in sorted(numbers) if n + 1 not in numbers]
    return list(zip(firsts, lasts, strict=True))


def _device(key: str, given: Any) -> torch.device:
    """Return the device that a user has given, with its number; refuse one that is not there."""
    if given == "disk":
        raise ValueError(
            f"`kv_device_map[{key!r}]` is 'disk'; pages are kept on disk by "
            "`placement=Offload(ram_bytes=..., offload_folder=...)`: give a device here."
        )
    if isinstance(given, bool) or not isinstance(given, int | str | torch.device):
        raise _unknown(key, given)
    try:
        accelerator = torch.accelerator.current_accelerator()
        if isinstance(given, int):
            if accelerator is None:
                raise _unknown(key, given)
            device = torch.device(accelerator.type, given)
        else:
            device = torch.device(given)
        if device.type == "cpu":
            return torch.device("cpu")
        module = torch.get_device_module(device.type)
        count = module.device_count()
        if count and device.index is None:
            device = torch.device(device.type, module.current_device())
    except (AttributeError, RuntimeError):
        raise _unknown(key, given) from None
    if device.index is None or device.index >= count:
        raise _unknown(key, given)
    return device


def _unknown(key: str, given: Any) -> ValueError:
    accelerator = torch.accelerator.current_accelerator()
    count = 0 if accelerator is None else torch.accelerator.device_count()
    names = [f"{accelerator.type}:{n}" for n in range(count)] if accelerator is not None else []
    return ValueError(
        f"`kv_device_map[{key!r}]` is {given!r}; it must be a device that is here: {[*names, 'cpu']}."
    )
