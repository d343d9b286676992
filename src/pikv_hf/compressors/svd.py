import functools
from dataclasses import dataclass, replace

import torch
from pikv_kernels import lowrank_attention
from torch import Tensor

from ..storage.finite import not_finite
from ..validation import check_count
from .base import Compressor, computed_dtype, in_portions, narrowed


@dataclass(frozen=True)
class Svd(Compressor):
    """Truncated singular value decomposition of the keys, and of the values, of each page.

    states [P, D] = coefficients [P, r] @ basis [r, D], the best approximation of rank r: its
    squared error is the sum of the squared singular values after the r-th (Eckart and Young). Each
    page has its own basis, so nothing is calibrated, but the basis is stored, too: r * (P + D)
    numbers instead of P * D. PiKV (arXiv 2508.06526) lists the decomposition among its compressors.

    The basis comes from the smaller Gram matrix of a page, which needs no inverse: with the
    eigenvectors U of X X^T, X = U (U^T X). The scale of a page is split between coefficients and
    basis by powers of two, so that neither overflows the model's dtype, nor their squares float32.

    Args:
        rank: numbers kept of a token, and vectors of a basis. A rank of at least the page size or
            the head dim is reduced to the smaller of them, and nothing is lost.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    def alternatives(self) -> tuple[Compressor, ...]:
        return (replace(self, rank=2 * self.rank),)

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return self._encode("key", keys) | self._encode("value", values)

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._decode("key", fields), self._decode("value", fields)

    def attend(
        self, query: Tensor, fields: dict[str, Tensor], tokens: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        coefficients = fields["key_coefficients"]
        # The bases of pages are multiplied with the queries, or with the tokens if these are fewer.
        if query.shape[2] > coefficients.shape[3]:
            return super().attend(query, fields, tokens, scale)
        key = coefficients, fields["key_basis"]
        value = fields["value_coefficients"], fields["value_basis"]
        is_latent = value[1].shape[-1] == 0
        return lowrank_attention(query, key, key if is_latent else value, tokens, scale)

    def bytes_per_token(
        self, key_dim: int, value_dim: int, element_size: int, page_size: int
    ) -> float:
        ranks = (min(self.rank, dim, page_size) for dim in (key_dim, value_dim))
        shares = (1 + key_dim / page_size, 1 + value_dim / page_size)
        return element_size * sum(r * share for r, share in zip(ranks, shares, strict=True))

    def _encode(self, name: str, states: Tensor) -> dict[str, Tensor]:
        if states.shape[-1] == 0:
            fields = {"coefficients": states, "basis": states[..., :0, :]}
        else:
            fields = in_portions(functools.partial(self._truncated, name), states)
        return {f"{name}_{part}": tensor for part, tensor in fields.items()}

    def _truncated(self, name: str, pages: Tensor) -> dict[str, Tensor]:
        """Return `coefficients` [n, P, r] and `basis` [n, r, D] of `pages` [n, P, D]."""
        exact = pages.to(computed_dtype(pages.dtype))
        largest = exact.abs().amax((-2, -1), keepdim=True)
        if not largest.isfinite().all():  # NaN has no eigenvectors
            raise ValueError(not_finite(self, name))
        size = _exponent(largest)
        exact = torch.ldexp(exact, -size)
        tokens, dim = pages.shape[1:]
        gram = exact @ exact.mT if tokens < dim else exact.mT @ exact
        # Eigenvalues come in ascending order.
        values, vectors = (t[..., -self.rank :] for t in torch.linalg.eigh(gram))
        if tokens < dim:
            coefficients, basis = vectors, vectors.mT @ exact
        else:
            coefficients, basis = exact @ vectors, vectors.mT
        # One factor is orthonormal, the other has the size of the singular values.
        share = (size + _exponent(values.clamp_min(0).sqrt()[:, None])) // 2
        if tokens >= dim:
            share = size - share
        coefficients, basis = (
            torch.ldexp(coefficients, share),
            torch.ldexp(basis, (size - share).mT),
        )
        return {"coefficients": coefficients.to(pages.dtype), "basis": basis.to(pages.dtype)}

    def _decode(self, name: str, fields: dict[str, Tensor]) -> Tensor:
        coefficients, basis = fields[f"{name}_coefficients"], fields[f"{name}_basis"]
        if basis.shape[-1] == 0:
            return coefficients
        wide = torch.float32 if basis.dtype == torch.float16 else basis.dtype
        return narrowed(coefficients.to(wide) @ basis.to(wide), basis.dtype)


def _exponent(sizes: Tensor) -> Tensor:
    """Return int32 exponents e of `sizes` < 2^e (0 for 0); float32 holds 2^e and 2^-e."""
    return torch.frexp(sizes).exponent.clamp(-100, 100)
