"""The error that compressed pages cause in attention outputs, measured at each seal.

Shapes: R rows, H KV heads, T tokens, Q queries, D key dim, Dv value dim.
"""

from collections.abc import Iterator

import torch
from pikv_kernels import merge_partial
from torch import Tensor

from ..storage.codec import attend_states
from ..storage.page_table import PageTable
from ..storage.row_map import Partial
from ..storage.token_table import TokenTable

_QUERIES = 16  # newest tokens whose queries are used
_BLOCK = 2048  # tokens copied in float32 at a time


class Probe:
    """Sums of squares of one layer: of the error of attention outputs, and of the exact outputs.

    The sums stay on the device of the layer until `error` is read. `observed_queries`: number of
    newest tokens whose queries are to be observed, 0 if nothing is measured.
    """

    def __init__(self, is_on: bool) -> None:
        self.observed_queries = _QUERIES if is_on else 0
        self._sums: Tensor | None = None

    def reset(self) -> None:
        self._sums = None

    def measure(
        self, span: TokenTable, pages: PageTable, query: Tensor, scale: float, rank: int | None
    ) -> None:
        """Compare attention of `query` [R, H, Q, D] over `span` and over `pages` of these tokens.

        `rank`: of latents, the number of dims that are values; None for keys with values. Zero
        queries, which stand for padding, do not count.
        """
        exact, stored = _exact(query, span, scale), _start(query, span)
        for slab in pages.slabs:
            for part in slab.attend(query, scale):
                stored = merge_partial(*stored, *part)
        counts = (query != 0).any(-1, keepdim=True)
        expected, actual = (part[0][..., :rank] * counts for part in (exact, stored))
        sums = torch.stack([(actual - expected).square().sum(), expected.square().sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def error(self) -> float | None:
        """Relative error: the root of the first sum over the second; None if the second is 0."""
        if self._sums is None:
            return None
        wrong, whole = self._sums.tolist()
        return (wrong / whole) ** 0.5 if whole else None

    def tensors(self) -> Iterator[Tensor]:
        if self._sums is not None:
            yield self._sums


def _start(query: Tensor, span: TokenTable) -> Partial:
    """Return attention over no key: zeros, and a log-sum-exp that any other outweighs."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    dim = span["values"].shape[-1] or span["keys"].shape[-1]
    lse = query.new_full(query.shape[:3], torch.finfo(dtype).min / 2, dtype=dtype)
    return query.new_zeros(*query.shape[:3], dim, dtype=dtype), lse


def _exact(query: Tensor, span: TokenTable, scale: float) -> Partial:
    """Return attention over the tokens themselves, computed in float32 or float64."""
    result = _start(query, span)
    dtype = result[0].dtype
    for start in range(0, len(span), _BLOCK):
        block = span.narrow(start, min(_BLOCK, len(span) - start))
        keys, values = block["keys"].to(dtype), block["values"].to(dtype)
        part = attend_states(query.to(dtype), keys, values, None, scale)
        result = merge_partial(*result, *part)
    return result
