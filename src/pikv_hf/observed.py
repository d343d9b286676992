"""The newest queries of one layer, for methods that ask what is attended to."""

from collections.abc import Iterator

import torch
from torch import Tensor


class Observed:
    """Queries [B, H, G, n, D] of the newest n tokens, at most `limit`, of each KV head's G heads.

    Those of padding are zeros. A copy: nothing keeps the prompt's queries alive.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.queries: Tensor | None = None

    def append(self, queries: Tensor, visible: Tensor | None) -> None:
        """`queries` [B, H, G, q, D] of new tokens, `visible` [B or 1, q] where they are no padding."""
        newest = queries[:, :, :, -self.limit :].detach()
        if visible is not None:
            seen = visible[:, None, None, -self.limit :, None]
            newest = newest * seen.to(newest.device, newest.dtype)
        kept = self.limit - newest.shape[3]
        if self.queries is None or kept <= 0:
            self.queries = newest.clone()
        else:
            self.queries = torch.cat([self.queries[:, :, :, -kept:], newest], dim=3)

    def truncate(self, removed: int) -> None:
        """Forget the newest `removed` tokens."""
        if self.queries is not None and removed:
            left = max(self.queries.shape[3] - removed, 0)
            self.queries = self.queries[:, :, :, :left].clone() if left else None

    def map_rows(self, index: Tensor) -> None:
        if self.queries is not None:
            self.queries = self.queries.index_select(0, index.to(self.queries.device))

    def of_rows(self, rows: list[int], newest: int) -> Tensor | None:
        """Those of at most `newest` tokens, [R, H, G, n, D]; None before any, or for 0."""
        if self.queries is None or newest == 0:
            return None
        queries = self.queries[:, :, :, -newest:]
        if rows == list(range(queries.shape[0])):
            return queries
        return queries.index_select(0, torch.tensor(rows, device=queries.device))

    def tensors(self) -> Iterator[Tensor]:
        if self.queries is not None:
            yield self.queries
