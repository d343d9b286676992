"""Cutting of tokens into pages.

Shapes: R rows, H KV heads, T tokens, S pages.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import on_device
from .token_table import TokenTable


def paged(tensor: Tensor, size: int) -> Tensor:
    """Cut [R, H, T, ...] into pages [R, H, S, size, ...], the last one padded with zeros."""
    missing = -tensor.shape[2] % size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, missing))
    pages = tensor.shape[2] // size
    return tensor.reshape(*tensor.shape[:2], pages, size, *tensor.shape[3:])


def first_places(lengths: list[int], tokens: int, device: torch.device) -> Tensor:
    """Return [R, tokens] bool, True at the first `lengths[r]` places of row r."""
    place = torch.arange(tokens, device=device)
    return place < on_device(tuple(lengths), device)[:, None]


def zeroed_behind(span: TokenTable, lengths: list[int]) -> TokenTable:
    """Return `span` with zero keys and values behind the first `lengths[r]` tokens of row r."""
    absent = ~first_places(lengths, len(span), next(iter(span.tensors.values())).device)
    states = (name for name in ("keys", "values") if name in span)
    changed = {
        k: span[k].masked_fill(absent.to(span[k].device)[:, None, :, None], 0) for k in states
    }
    rows = {k: t.expand(len(lengths), *t.shape[1:]) for k, t in span.tensors.items()}
    return TokenTable(rows | changed)
