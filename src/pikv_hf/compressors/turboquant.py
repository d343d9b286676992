import functools
import math
from dataclasses import dataclass, replace

import torch
from pikv_kernels import PACKED_TOGETHER, look_up, pack_indices, partial_attention, word_table
from torch import Tensor

from ..storage.codec import flat_tokens
from ..validation import check_flag, check_whole
from .base import Compressor, computed_dtype, in_portions, narrowed

GRID = 2**16  # cells in which the density of a coordinate is integrated
LLOYD_STEPS = 300


@dataclass(frozen=True)
class TurboQuant(Compressor):
    """Random rotation and a Lloyd-Max codebook for each coordinate (TurboQuant, arXiv 2504.19874).

    After a random rotation the coordinates of every vector have one known density, so a codebook
    made for that density needs no data. Keys and values use algorithm 1 of the paper with one
    change: the norm stored beside the codes makes a decoded vector as long as the original, while
    the paper's norm shrinks it. Distortion grows by at most 3 %, and decoded pages of usual head
    dims can be encoded again without loss. With `residual`, keys use algorithm 2 unchanged:
    one bit less for the codebook, and the signs of a Gaussian sketch of the residual (QJL), with a
    norm. Products with such keys are unbiased but vary more, and encoding the keys again adds
    variance. Norms are root mean squares (so that float16 holds them) in the dtype of the model.

    The rotation is a uniformly random orthogonal matrix and not a Hadamard matrix: it gives exactly
    the density of the paper, in any head dim. Query and output are rotated, not pages. `seed` alone
    determines rotation and sketch, which are made on the CPU and cached for the process.

    Args:
        bits: bits of a code: 2, 3 or 4.
        residual: spend one bit of every key coordinate on the sketch.
        seed: seed of rotation and sketch.
    """

    bits: int = 4
    residual: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in PACKED_TOGETHER:
            raise ValueError(f"`bits` is {self.bits!r}; it must be one of {[*PACKED_TOGETHER]}.")
        check_flag("residual", self.residual)
        check_whole("seed", self.seed)

    @property
    def is_per_token(self) -> bool:
        return True

    @property
    def is_idempotent(self) -> bool:
        return not self.residual

    def alternatives(self) -> tuple[Compressor, ...]:
        plain = (replace(self, residual=False),) if self.residual else ()
        return plain if self.bits == 4 else (*plain, replace(self, bits=self.bits + 1))

    def check_dims(self, key_dim: int, value_dim: int) -> None:
        together = PACKED_TOGETHER[self.bits]
        for name, dim in (("key", key_dim), ("value", value_dim)):
            if dim % together:
                raise ValueError(
                    f"turboquant packs {together} numbers of {self.bits} bits together, but the "
                    f"{name} dim is {dim}, which is no multiple of that."
                )

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        self.check_dims(keys.shape[-1], values.shape[-1])
        return self._encode("key", keys, self.residual) | self._encode("value", values, False)

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        values = self._looked_up(fields["value_codes"], fields["value_norms"])
        return self.decode_keys(fields), self._restored(values, False)

    def decode_keys(self, fields: dict[str, Tensor]) -> Tensor:
        keys = self._looked_up(fields["key_codes"], fields["key_norms"])
        return self._restored(keys, self.residual)

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        keys, values = (flat_tokens(pages, tokens) for pages in self._stored(fields))
        is_latent = values.shape[-1] == 0
        basis = _basis(query.shape[-1], self.residual, self.seed, query.device)
        out, lse = partial_attention(
            _times(query, basis.T), keys, keys if is_latent else values, None, scale
        )
        return self._restored(out, self.residual and is_latent), lse

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        norms = (key_dim > 0) * (1 + self.residual) + (value_dim > 0)
        return (key_dim + value_dim) * self.bits / 8 + norms * element_size

    def _encode(self, name: str, states: Tensor, residual: bool) -> dict[str, Tensor]:
        """Return packed codes of `states` [..., P, D], and norms [..., P, 1 + residual]."""
        dim = states.shape[-1]
        if dim == 0:
            return {f"{name}_codes": states.to(torch.uint8), f"{name}_norms": states}
        fields = in_portions(lambda pages: self._quantize(pages, residual), states)
        return {f"{name}_{part}": tensor for part, tensor in fields.items()}

    def _quantize(self, pages: Tensor, residual: bool) -> dict[str, Tensor]:
        dim, dtype = pages.shape[-1], pages.dtype
        basis = _basis(dim, residual, self.seed, pages.device)
        centroids = _centroids(self.bits - residual, dim, pages.device)
        # Scaled by the largest number first: float32 may not hold its square.
        pages = pages.to(computed_dtype(dtype))
        size = pages.abs().amax(dim=-1, keepdim=True)
        pages = (pages / size.clamp_min(torch.finfo(size.dtype).tiny)).float()
        norm = _rms(pages)
        pages = pages / norm.clamp_min(torch.finfo(torch.float32).tiny)
        norm = norm * size
        codes = _nearest(pages @ basis[:dim].T, centroids)
        levels = centroids.index_select(0, codes.flatten().int()).view(pages.shape)
        if residual:
            rest = pages - levels @ basis[:dim]
            codes += (rest @ basis[dim:].T >= 0) * len(centroids)
            norms = torch.cat([norm, _rms(rest) * norm], dim=-1)
        else:
            norms = norm / _rms(levels)
        return {"codes": pack_indices(codes, self.bits), "norms": narrowed(norms, dtype)}

    def _stored(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values [..., P, D], or 2 D with `residual`, in the stored basis."""
        keys = self._looked_up(fields["key_codes"], fields["key_norms"])
        return keys, self._looked_up(fields["value_codes"], fields["value_norms"])

    def _looked_up(self, codes: Tensor, norms: Tensor) -> Tensor:
        if codes.shape[-1] == 0:
            return norms
        dtype = norms.dtype if norms.element_size() == 2 else torch.float32
        parts = norms.split(1, dim=-1)
        dim, residual = codes.shape[-1] * 8 // self.bits, len(parts) > 1
        tables = _tables(self.bits, dim, residual, dtype, codes.device)
        levels = (look_up(codes, table, self.bits, dtype) for table in tables)
        states = [level * norm for level, norm in zip(levels, parts, strict=True)]
        return torch.cat(states, dim=-1) if residual else states[0]

    def _restored(self, states: Tensor, residual: bool) -> Tensor:
        """Transform `states` from the stored basis to the basis of the model."""
        dim = states.shape[-1] // (1 + residual)
        return _times(states, _basis(dim, residual, self.seed, states.device)) if dim else states


def _times(states: Tensor, matrix: Tensor) -> Tensor:
    return narrowed(states.float() @ matrix, states.dtype)


def _nearest(states: Tensor, centroids: Tensor) -> Tensor:
    """Return the uint8 code of each element."""
    borders = (centroids[1:] + centroids[:-1]) / 2
    if states.device.type != "cpu":
        return torch.bucketize(states, borders).to(torch.uint8)
    # On a CPU this is 6 times faster than `torch.bucketize`.
    codes = torch.zeros(states.shape, dtype=torch.uint8, device=states.device)
    for border in borders.unbind():
        codes += states > border
    return codes


def _rms(states: Tensor) -> Tensor:
    return states.square().mean(dim=-1, keepdim=True).sqrt()


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _basis(dim: int, residual: bool, seed: int, device: torch.device) -> Tensor:
    """Return the rotation [D, D] above the sketch [D, D], scaled so that stored @ basis = states.

    With s = sign(S r) the sketch of a residual r is sqrt(pi / 2) / D * |r| * S^T s (definition 1 of
    the paper); we store |r| / sqrt(D), so S is scaled by sqrt(pi / (2 D)).
    """
    draw = functools.partial(torch.randn, generator=torch.Generator("cpu").manual_seed(seed))
    gauss, sketch = draw(2, dim, dim, dtype=torch.float64, device="cpu")
    rotation, upper = torch.linalg.qr(gauss)
    basis = rotation * upper.diagonal().sign()  # makes it independent of the QR implementation
    if residual:
        basis = torch.cat([basis, sketch * math.sqrt(math.pi / (2 * dim))])
    return basis.to(device, torch.float32)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _tables(
    bits: int, dim: int, residual: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return tables of centroids and, with residual, of the signs in the highest bit of codes."""
    values = [_codebook(bits - residual, dim).repeat(1 + residual)]
    if residual:
        values.append(torch.tensor([-1.0, 1.0], device="cpu").repeat_interleave(2 ** (bits - 1)))
    return tuple(word_table(value.to(device, dtype), bits) for value in values)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _centroids(bits: int, dim: int, device: torch.device) -> Tensor:
    """Return `_codebook` on `device` in float32."""
    return _codebook(bits, dim).to(device, torch.float32)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _codebook(bits: int, dim: int) -> Tensor:
    """Return the levels [2^bits] of least squared error for a coordinate of random vectors of rms 1.

    Lloyd iteration on the density (1 - x^2)^((D - 3) / 2) of a coordinate x on the unit sphere.
    """
    width = 2 / GRID
    x = (torch.arange(GRID, dtype=torch.float64, device="cpu") + 0.5) * width - 1
    density = (1 - x * x) ** ((dim - 3) / 2)
    sums = torch.nn.functional.pad(torch.stack([density, density * x]).cumsum(1), (1, 0))

    def below(edges: Tensor) -> Tensor:
        """Return mass and first moment of the density below `edges`, linear within a cell."""
        cell = (edges + 1) / width
        first = cell.long().clamp(max=GRID - 1)
        return torch.lerp(sums[:, first], sums[:, first + 1], cell - first)

    # Start where density^(1/3) has equal mass on both sides: nearly optimal for many bits.
    spread = density.pow(1 / 3).cumsum(0)
    quantiles = (torch.arange(2**bits, dtype=torch.float64, device="cpu") + 0.5) / 2**bits
    levels = x[torch.searchsorted(spread, quantiles * spread[-1])]
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")
    for _ in range(LLOYD_STEPS):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        mass, moment = below(edges).diff()
        levels = moment / mass
    return levels * math.sqrt(dim)
