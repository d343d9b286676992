from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import ClassVar

import torch
from pikv_kernels import partial_attention
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from ..model.artifact import check_method, read_factors
from ..storage.codec import flat_tokens
from .base import Compressor, computed_dtype, narrowed
from .moments import Moments

Factors = dict[str, Tensor]

# Numbers of a row that encoding copies at a time, and the maximum number of copies for a prompt.
# Copies as large as the codes leave holes in the heap; many small copies are slow on a GPU.
COPIED, MAX_PORTIONS = 2**14, 32


@dataclass(frozen=True)
class LowRank(Compressor):
    """Calibrated low-rank projections for each layer and KV head; the paper calls them LoRA.

    A key (after RoPE), value or latent x of D dims is stored as r numbers c = x down and decoded as
    c up, with up down = 1: decoded states are encoded again without a loss. `pikv calibrate`
    makes `down` [H, D, r] and `up` [H, r, D] from texts: the principal axes, not centred, which are
    the best linear projection, or, after training, the factors that change attention outputs least.
    PiKV (arXiv 2508.06526) defines LoRA by this error; Palu (arXiv 2407.21118) is similar.

    Attention reads the codes c: q . (c up) = (q up^T) . c, and sum p (c up) = (sum p c) up.

    Args:
        calibration: the file that `pikv calibrate` made for the model, which also fixes r.
    """

    name: ClassVar[str] = "lowrank"
    needs_calibration: ClassVar[bool] = True
    block_tokens: ClassVar[int | None] = None

    calibration: str | PathLike[str] | None = None
    # The KV head that is encoded; None = all heads of the layer.
    _head: int | None = field(default=None, repr=False)
    # Factors of the bound layer, named `key_up`, ..., on the device last used.
    _factors: Factors | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.calibration is not None and not isinstance(self.calibration, str | PathLike):
            raise TypeError(
                f"`calibration` is {self.calibration!r}; it must be the path of a file that "
                "`pikv calibrate` made."
            )

    @property
    def title(self) -> str:
        return self.name

    def check(self, model: PreTrainedModel) -> None:
        check_method(self._path(), model, self.name)

    def bind(self, config: PreTrainedConfig, layer_idx: int) -> Self:
        return self.with_factors(read_factors(self._path(), f"{self.name}.{layer_idx}."))

    def of_head(self, head: int) -> Self:
        factors = {name: tensor[head : head + 1] for name, tensor in self._bound().items()}
        return replace(self, _head=head, _factors=factors)

    def with_factors(self, factors: Factors) -> Self:
        """Return this compressor with the `factors` of a layer, none if the layer is not paged."""
        return replace(self, _factors=dict(factors))

    @property
    def is_per_token(self) -> bool:
        return True

    def tensors(self) -> Iterator[Tensor]:
        yield from (self._factors or {}).values()

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        fields = {"key_codes": self._encode("key", keys)}
        return fields | {"value_codes": self._encode("value", values)}

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.decode_keys(fields), self._decode("value", fields["value_codes"])

    def decode_keys(self, fields: dict[str, Tensor]) -> Tensor:
        return self._decode("key", fields["key_codes"])

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        # Latents are their own values.
        name = "key" if fields["value_codes"].shape[-1] == 0 else "value"
        wide = computed_dtype(query.dtype)
        key, value = (self.of(part, query.device, wide) for part in ("key", name))
        keys = self._read("key", fields, tokens)
        values = keys if name == "key" else self._read("value", fields, tokens)
        # Scaled before rounding, so that float16 holds the numbers.
        projected = (query.to(wide) @ key["up"].mT * scale).to(query.dtype)
        out, lse = partial_attention(projected, keys, values, None, 1.0)
        if "bias" in key:  # adds one number to all scores of these pages, but not to other scores
            shift = query.to(wide) @ key["bias"][..., None]
            lse = lse + shift.squeeze(-1) * scale
        out = out.to(wide) @ value["up"]
        return out.add_(value["bias"][:, None]) if "bias" in value else out, lse

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        factors = self._bound()
        ranks = [
            factors[f"{name}_down"].shape[-1] if dim else 0
            for name, dim in (("key", key_dim), ("value", value_dim))
        ]
        return float(sum(ranks) * element_size)

    # ---- for states [H, n, D] in their own dtype, which calibration uses, too -------------------

    @classmethod
    def initial(cls, moments: Moments, rank: int, generator: torch.Generator) -> Factors:
        """Return float32 free parameters: the principal axes of the states of `moments`."""
        axes, _ = moments.axes(rank, centred=False)
        return {"down": axes.mT.float().contiguous(), "up": axes.float()}

    @classmethod
    def constrained(cls, free: Factors) -> Factors:
        """Turn `free` parameters into factors with up down = 1; differentiable."""
        up = free["up"]
        # A singular matrix gives training NaN, which is never the best result, not an exception.
        inverse, _ = torch.linalg.inv_ex(up @ free["down"])
        return {"down": free["down"] @ inverse, "up": up}

    @classmethod
    def rescaled(cls, factors: Factors, size: Tensor) -> Factors:
        """Turn `factors` fitted to states into factors for the states times `size` [H]."""
        return factors

    @classmethod
    def features(cls, codes: Tensor, factors: Factors) -> Tensor:
        """Return the features of codes [..., H, n, r] that `up` is applied to."""
        return codes

    @classmethod
    def restored(cls, codes: Tensor, factors: Factors) -> Tensor:
        """Decode codes [..., H, n, r] to states [..., H, n, D]."""
        states = cls.features(codes, factors) @ factors["up"]
        return states + factors["bias"][:, None] if "bias" in factors else states

    # ---- for pages ------------------------------------------------------------------------------

    def of(self, name: str, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return factors of `name` "key" or "value" in `dtype`; move them to `device` for good."""
        factors = self._bound()
        for part, tensor in factors.items():
            if tensor.device != device:
                factors[part] = tensor.to(device)
        start = f"{name}_"
        return {
            part.removeprefix(start): tensor.to(dtype)
            for part, tensor in factors.items()
            if part.startswith(start)
        }

    def _encode(self, name: str, states: Tensor) -> Tensor:
        if states.shape[-1] == 0:
            return states
        wide = computed_dtype(states.dtype)
        down = self.of(name, states.device, wide)["down"]
        if states.shape[1] != down.shape[0] or states.shape[-1] != down.shape[-2]:
            raise ValueError(
                f"{self.name} was calibrated for {name}s of (heads, dim) = "
                f"{(down.shape[0], down.shape[-2])}, not {(states.shape[1], states.shape[-1])}."
            )
        codes = states.new_empty(*states.shape[:-1], down.shape[-1])
        flat = codes.flatten(2, 3), states.flatten(2, 3)
        step = max(1, COPIED // down[..., 0].numel(), flat[0].shape[2] // MAX_PORTIONS)
        for target, part in zip(*(t.split(step, dim=2) for t in flat), strict=True):
            target.copy_(narrowed(part.to(wide) @ down, codes.dtype))
        return codes

    def _decode(self, name: str, codes: Tensor) -> Tensor:
        if codes.shape[-1] == 0:
            return codes
        wide = computed_dtype(codes.dtype)
        flat = codes.flatten(2, 3).to(wide)
        states = self.restored(flat, self.of(name, codes.device, wide))
        return narrowed(states.unflatten(2, codes.shape[2:4]), codes.dtype)

    def _read(self, name: str, fields: dict[str, Tensor], tokens: int) -> Tensor:
        """Return the features [R, H, T, ...] of the first `tokens` tokens."""
        codes = flat_tokens(fields[f"{name}_codes"], tokens)
        return self.features(codes, self.of(name, codes.device, codes.dtype))

    def _path(self) -> str | PathLike[str]:
        if self.calibration is None:
            raise ValueError(
                f"{self.name} needs a calibration for the model: make one with `pikv calibrate`, and "
                f"pass compressor={type(self).__name__}(calibration='cal.safetensors')."
            )
        return self.calibration

    def _bound(self) -> Factors:
        if not self._factors:
            self._path()
            raise ValueError(
                f"{self.name} has no projections for this layer: the model that was calibrated did "
                "not page it."
            )
        return self._factors


@dataclass(frozen=True)
class LowRankAffine(LowRank):
    """`LowRank` with a bias: the principal axes of centred states; the paper calls it LoRA++.

    x is decoded as c up + bias, with bias down = 0. The bias of keys adds q . bias to every score,
    which matters only when results are merged with other keys: it is added to the log-sum-exp. For
    equal r the squared error on the calibration texts is at most the error of `LowRank`.

    Args:
        calibration: the file that `pikv calibrate` made for the model, which also fixes r.
    """

    name: ClassVar[str] = "lowrank_affine"

    @classmethod
    def initial(cls, moments: Moments, rank: int, generator: torch.Generator) -> Factors:
        axes, _ = moments.axes(rank, centred=True)
        bias = moments.mean.float()
        return {"down": axes.mT.float().contiguous(), "up": axes.float(), "bias": bias}

    @classmethod
    def constrained(cls, free: Factors) -> Factors:
        factors = super().constrained(free)
        bias = outside(free["bias"][:, None], factors).squeeze(1)
        return factors | {"bias": bias}

    @classmethod
    def rescaled(cls, factors: Factors, size: Tensor) -> Factors:
        return factors | {"bias": factors["bias"] * size[:, None]}


def outside(states: Tensor, factors: Factors) -> Tensor:
    """Return the part of `states` [H, n, D] that is not stored: its code is 0."""
    return states - states @ factors["down"] @ factors["up"]
