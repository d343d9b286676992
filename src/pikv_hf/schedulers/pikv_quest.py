from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.artifact import check_method, read_factors, read_metadata
from ..model.rotary import Rotary
from .base import Candidates, Needs, Scheduler, TokenConstants, Traits

NAME = "pikv_quest"
# Candidates whose keys and values are copied to float32 at a time.
BLOCK = 1024

Network = dict[str, Tensor]  # `hidden` [H, D, m], `bias` [H, m], `out` [H, m]


@dataclass(frozen=True)
class PiKVQuest(Scheduler, TokenConstants):
    """Keeps tokens chosen by a small network (PiKV's "QUEST", arXiv 2508.06526: u = MLP([K, V])).

    u is the utility of a token. Not Quest, which selects pages for a query (arXiv 2406.10774). Each
    KV head of each layer has a network of one hidden layer. It reads the value of a token and its
    key, turned back to position 0: from keys as cached it would learn where tokens stood in the
    texts of the calibration. For latents (MLA) it reads the latent and the rotary key. The score is
    the softmax of u over the candidates. `pikv calibrate --method pikv_quest` trains the networks
    to predict the distribution of later queries' attention over the tokens of a text.

    Args:
        calibration: the file that `pikv calibrate` made for the model.
    """

    needs_file: ClassVar[bool] = True
    constant_inputs: ClassVar[frozenset[str]] = frozenset({"values"})

    calibration: str | PathLike[str] | None = None
    # By layer, on the device that used it last.
    _networks: dict[int, Network] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        path = self.calibration
        if path is not None and not isinstance(path, str | PathLike):
            raise TypeError(
                f"`calibration` is {path!r}; it must be the path of a file that `pikv calibrate` made."
            )
        object.__setattr__(self, "_networks", {} if path is None else read_networks(path))

    def __deepcopy__(self, memo: dict[int, Any]) -> "PiKVQuest":
        return self  # copies of a cache share the networks

    def check(self, model: PreTrainedModel, layers: int) -> None:
        if self.calibration is None:
            raise ValueError(
                f"`scheduler` is {NAME!r}, which needs a calibration for the model: make one with "
                f"`pikv calibrate --method {NAME}`, and pass "
                "scheduler=PiKVQuest(calibration='cal.safetensors')."
            )
        check_method(self.calibration, model, NAME)

    @property
    def needs(self) -> Needs:
        return Needs(inputs=frozenset({"rotary"}), constants=self)

    @property
    def traits(self) -> Traits:
        return Traits(numbers_heads=True)

    def tensors(self, layer_idx: int) -> Iterator[Tensor]:
        yield from self._networks.get(layer_idx, {}).values()

    def constants(self, tokens: Candidates) -> Tensor:
        network, rotary = self._network(tokens.layer_idx, tokens.keys), tokens.rotary
        assert rotary is not None and tokens.values is not None, "both are among the needs"
        parts = tokens.keys, tokens.values, tokens.positions
        blocks = (t.split(BLOCK, dim=2) for t in parts)
        utilities = [
            utility(position_free(keys, values, at, rotary), network)
            for keys, values, at in zip(*blocks, strict=True)
        ]
        return torch.cat(utilities, dim=2)[..., None]

    def scores(self, tokens: Candidates) -> Tensor:
        assert tokens.constants is not None, "they are among the needs"
        utilities = tokens.constants[..., 0]
        lowest = torch.finfo(utilities.dtype).min
        return utilities.masked_fill(tokens.number() < 0, lowest).softmax(-1)

    def _network(self, layer_idx: int, keys: Tensor) -> Network:
        """Return the network of a layer, moved to the device of `keys` [R, H, T, D] for good."""
        network = self._networks.get(layer_idx)
        heads = 0 if network is None else len(network["out"])
        if network is None or heads != keys.shape[1]:
            raise ValueError(
                f"`calibration` has {heads} KV heads for layer {layer_idx}, but the cache has "
                f"{keys.shape[1]}: make one for this model with `pikv calibrate --method {NAME}`."
            )
        for part, tensor in network.items():
            if tensor.device != keys.device:
                network[part] = tensor.to(keys.device)
        return network


def read_networks(path: str | PathLike[str]) -> dict[int, Network]:
    """Read the networks of a calibration file, by layer; none if it is for other methods.

    Raises:
        ValueError: there is no such file, or `pikv calibrate` did not make it.
    """
    read_metadata(path)
    networks: dict[int, Network] = {}
    for name, tensor in read_factors(path, f"{NAME}.").items():
        layer, _, part = name.partition(".")
        networks.setdefault(int(layer), {})[part] = tensor
    return networks


def position_free(keys: Tensor, values: Tensor, places: Tensor, rotary: Rotary) -> Tensor:
    """Return [..., T, D + Dv] float32: keys turned back to position 0, and values beside them.

    `keys` [..., T, D] are at positions `places` [..., T]; `values` are [..., T, Dv].
    """
    return torch.cat([rotary.unrotate(keys, places), values.float()], dim=-1)


def utility(states: Tensor, network: Network) -> Tensor:
    """Return the utilities u [..., H, T] of `states` [..., H, T, D]."""
    units = (states @ network["hidden"] + network["bias"][:, None]).relu()
    return (units @ network["out"][..., None])[..., 0]
