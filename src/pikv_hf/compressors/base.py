"""The base class of compressors, and what their encodings share."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..storage.codec import PageCodec


class Compressor(PageCodec):
    """A codec that a user can choose: it knows the models it serves and the bytes it takes.

    A compressor is a frozen dataclass: configuration without run state. `bind` returns a layer's
    compressor, which holds calibrated weights. A subclass defines `encode`, `decode` and
    `bytes_per_token`, and may override other methods of `PageCodec`.
    """

    #: True if it needs a file that `pikv calibrate` made for the model.
    needs_calibration: ClassVar[bool] = False

    @property
    def is_idempotent(self) -> bool:
        """True if decoded pages can be encoded again, as eviction does, with little more loss."""
        return True

    @property
    def is_splittable(self) -> bool:
        """True if some of a layer's KV heads alone are stored as they are among all.

        Weights of a calibration are of numbered heads, and mixed encodings share bytes among heads.
        """
        return not self.needs_calibration and not self.is_mixed

    def check(self, model: PreTrainedModel) -> None:
        """Check `model` once, before a cache is made for it.

        Raises:
            ValueError: the compressor cannot serve it: it may be calibrated for another model.
        """
        return

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> "Compressor":
        """Return the compressor of one layer, for instance with weights calibrated for it.

        Raises:
            ValueError: the compressor cannot serve this layer of a model of this configuration.
        """
        return self

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        """Check the head dims of a layer before a cache is made, if the model tells them by then.

        Raises:
            ValueError: the compressor cannot store keys or values of these dims.
        """
        return

    def alternatives(self) -> "tuple[Compressor, ...]":
        """Return compressors to try if this one loses too much: other options, or similar methods.

        `Int8` is always tried. The `LossWarning` names the compressors that lose less.
        """
        return ()

    @abstractmethod
    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        """Return the bytes of a token of one KV head in a full page and its share of page data.

        `element_size` is the size in bytes of a number of the model's dtype.
        """


# Pages that are copied to float32 and encoded at a time. On a CPU these are few, as large copies
# miss its caches and leave holes in the heap: 1 / `PORTIONS` of the pages, within two bounds. On an
# accelerator they are many, because each portion launches kernels.
PAGES_AT_A_TIME, MIN_AT_A_TIME, PORTIONS = 16, 4, 32
PAGES_ON_ACCELERATORS = 1024


def portion(states: Tensor) -> int:
    """Return how many of the S pages of `states` [..., S, P, D] are encoded at a time."""
    lead = states.shape[:-2]
    pages = PAGES_ON_ACCELERATORS
    if states.device.type == "cpu":
        pages = min(max(math.prod(lead) // PORTIONS, MIN_AT_A_TIME), PAGES_AT_A_TIME)
    return max(1, pages // max(1, math.prod(lead[:-1])))


def in_portions(encode: Callable[[Tensor], dict[str, Tensor]], states: Tensor) -> dict[str, Tensor]:
    """Apply `encode` to a few pages [n, P, D] of `states` [..., S, P, D] at a time.

    Only the result is made in full: neither a dense copy of `states` nor a list of parts.
    """
    lead, whole = states.shape[:-2], {}
    step = portion(states)
    for start in range(0, max(1, lead[-1]), step):
        pages = states.narrow(-3, start, min(step, lead[-1] - start))
        for name, part in encode(pages.flatten(0, -3)).items():
            if name not in whole:
                whole[name] = part.new_empty(*lead, *part.shape[1:])
            target = whole[name].narrow(len(lead) - 1, start, pages.shape[-3])
            target.copy_(part.view(target.shape))
    return whole


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of `dtype` are scaled: float32 or float64."""
    return torch.promote_types(dtype, torch.float32)


def narrowed(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert decoded `states` to `dtype`.

    Float16 ends at 65504: a number near it may be decoded to a larger one, but never to infinity.
    """
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        states = states.clamp(-top, top)
    return states.to(dtype)
