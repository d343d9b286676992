"""A warning when sealed pages differ much from their original keys and values."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..compressors import Compressor, Int8
from ..storage.page_table import PageTable
from ..storage.token_table import TokenTable

LIMIT = 0.2
"""Relative root mean square error of keys, or of values, above which a layer warns.

On ordinary numbers 8 bits lose .01 (`int8`) to .05 (`fp8` e5m2), 4 bits .10 to .13, 3 bits .17,
2 bits .34 and more. `int4` without rotation loses more where a few channels outweigh the others.
"""
MAX_PAGES = 8


class LossWarning(UserWarning):
    """Keys or values of a layer lose more than `loss_guard.LIMIT` when they are sealed."""


class Guard:
    """Compares a few pages of one layer with their originals, and warns once.

    It compares at the first seal, and then whenever the tokens that have left the tail have
    doubled, so that most seals cost nothing. Tokens that are evicted at once are compared, too.
    """

    def __init__(self) -> None:
        self.due_at = 1
        self.has_warned = False

    def reset(self) -> None:
        """Compare at the next seal; a layer that has warned does not warn again."""
        self.due_at = 1

    def is_due(self, compressor: Compressor, sealed: int) -> bool:
        """Return True if a comparison is due when `sealed` tokens of a row have left the tail."""
        return not (self.has_warned or sealed < self.due_at or compressor.is_lossless)

    def check(
        self,
        compressor: Compressor,
        table: PageTable,
        span: TokenTable,
        queries: Tensor | None,
        sealed: int,
        layer_idx: int,
    ) -> None:
        """Warn if `compressor` loses much of `span`, tokens for `table`, which is not changed.

        `sealed` tokens of a row have left the tail; `queries` as for `PageTable.append`.
        """
        if not self.is_due(compressor, sealed):
            return
        self.due_at = 2 * sealed
        sample = _sample(span, table.page_size)
        queries = None if queries is None else queries[:1]
        losses = _losses(sample, table.apart(sample, queries))
        losses = {name: loss for name, loss in losses.items() if loss > LIMIT}
        if not losses:
            return
        self.has_warned = True
        advice = _advice(compressor, sample, table.page_size, losses)
        text = _message(compressor.title, losses, advice, layer_idx)
        warnings.warn(text, LossWarning, stacklevel=2)


def _sample(span: TokenTable, page_size: int) -> TokenTable:
    """Return the first row: evenly spread whole pages, about `MAX_PAGES` over all heads.

    If the tokens do not fill a page, return all of them.
    """
    first = span.of_rows([0])
    whole = len(span) // page_size
    if whole == 0:
        return first
    count = max(1, min(whole, MAX_PAGES // span["keys"].shape[1]))
    pages = (2 * torch.arange(count) + 1) * whole // (2 * count)
    return first.select_tokens((pages[:, None] * page_size + torch.arange(page_size)).flatten())


def _losses(sample: TokenTable, pages: PageTable) -> dict[str, float]:
    """Return the relative root mean square errors of `keys` and `values`, if they have dims."""
    spans, names = pages.spans([0]), [n for n in ("keys", "values") if sample[n].shape[-1]]
    found = []
    for name in names:
        original = sample[name].float()
        decoded = torch.cat([span[name].float() for span in spans], dim=2)
        found.append((decoded - original).norm() / original.norm())
    return dict(zip(names, torch.stack(found).tolist(), strict=True))


def _advice(
    compressor: Compressor, sample: TokenTable, page_size: int, names: Iterable[str]
) -> dict[str, float]:
    """Return compressors that lose at most `LIMIT` of `names` in `sample`, with their losses.

    `Int8` is always among them: its error is at most 1/127 of the largest number of a token.
    """
    found: dict[str, float] = {}
    for other in (*compressor.alternatives(), Int8()):
        with contextlib.suppress(ValueError):  # raised for head dims that it cannot pack
            left = _losses(sample, PageTable(other, page_size).apart(sample))
            worst = max(left[name] for name in names)
            if worst <= LIMIT:
                found[_in_code(other)] = worst
    return found


def _in_code(compressor: Compressor) -> str:
    """Return the code that makes `compressor`, default arguments left out."""
    fields = dataclasses.fields(compressor)  # ty: ignore[invalid-argument-type]
    values = ((f.name, getattr(compressor, f.name), f.default) for f in fields if f.repr)
    given = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
    return f"{type(compressor).__name__}({given})"


def _message(title: str, losses: dict[str, float], advice: dict[str, float], layer_idx: int) -> str:
    changed = " and ".join(f"{name} by {loss:.2g}" for name, loss in losses.items())
    tries = [f"compressor={name} ({left:.2g})" for name, left in advice.items()]
    return (
        f"layer {layer_idx}: {title} changes {changed} of their size (root mean "
        f"square of a few pages), more than {LIMIT}: try {' or '.join(tries)}."
    )
