"""How a sealed page is stored, and how attention reads it."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..storage.codec import PageCodec


class Compressor(PageCodec):
    """A codec that a user can choose: it knows the models it serves, and the bytes it takes.

    A compressor is a frozen dataclass: its own configuration, without run state. A subclass defines
    `encode`, `decode` and `bytes_per_token`, and whatever else of `PageCodec` it does better.
    """

    #: Whether it must be given a file that `pikv calibrate` made for the model.
    needs_calibration: ClassVar[bool] = False

    @property
    def is_idempotent(self) -> bool:
        """Whether decoded pages may be encoded again, as eviction does, with little further loss."""
        return True

    def check(self, model: PreTrainedModel) -> None:
        """Check `model`, once, before a cache is made for it.

        Raises:
            ValueError: it cannot serve this model, for instance as its calibration is of another.
        """
        return

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> "Compressor":
        """The compressor of one layer, for instance with weights that were calibrated for it.

        Raises:
            ValueError: it cannot serve this layer of a model of this configuration.
        """
        return self

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        """Check the dims that a layer caches, before a cache is made, where the model tells them.

        Raises:
            ValueError: it cannot store keys or values of these dims.
        """
        return

    def alternatives(self) -> "tuple[Compressor, ...]":
        """Compressors to try when this one loses too much: its own options, or a relative.

        `Int8` is tried besides; a warning names those that lose less.
        """
        return ()

    @abstractmethod
    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        """Bytes that a token of one KV head takes in a full page, of what is stored once for it, too.

        `element_size` is the size in bytes of a number of the model's dtype.
        """


# Bounds the float32 copies that encoding a long prompt makes. On a CPU larger ones leave its caches,
# and holes in the heap when they are freed: a hole or two for each encoding, so that chunks of a prompt,
# which are many, are encoded in smaller portions. Elsewhere every portion is kernels to launch.
PAGES_AT_A_TIME, FEWEST_AT_A_TIME, PORTIONS = 16, 4, 32
PAGES_ON_ACCELERATORS = 1024


def portion(states: Tensor) -> int:
    """How many of S pages are encoded at a time, for `states` [..., S, P, D]."""
    lead = states.shape[:-2]
    most = PAGES_ON_ACCELERATORS
    if states.device.type == "cpu":
        most = min(max(math.prod(lead) // PORTIONS, FEWEST_AT_A_TIME), PAGES_AT_A_TIME)
    return max(1, most // max(1, math.prod(lead[:-1])))


def in_portions(encode: Callable[[Tensor], dict[str, Tensor]], states: Tensor) -> dict[str, Tensor]:
    """`encode` of a few pages [n, P, D] after the other, for `states` [..., S, P, D].

    What is made in full is what is returned: not a dense copy of `states`, nor a list of parts.
    """
    lead, whole = states.shape[:-2], {}
    step = portion(states)
    for start in range(0, max(1, lead[-1]), step):
        pages = states.narrow(-3, start, min(step, lead[-1] - start))
        for name, part in encode(pages.flatten(0, -3)).items():
            if name not in whole:
                whole[name] = part.new_empty(*lead, *part.shape[1:])
            mine = whole[name].narrow(len(lead) - 1, start, pages.shape[-3])
            mine.copy_(part.view(mine.shape))
    return whole


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are scaled: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def narrowed(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Decoded `states` in `dtype`.

    Float16 ends at 65504: an original close to it may be decoded beyond, but is never infinite.
    """
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        states = states.clamp(-top, top)
    return states.to(dtype)
