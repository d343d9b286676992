"""What the masks that models make say of columns."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .versions import attention_implementation, has_readable_masks


def visible_columns(mask: Tensor | None, length: int) -> Tensor | None:
    """Which of the last `length` columns the newest query sees: [B or 1, length] bool, None = all.

    `mask` is what the model made: bool or additive [B, 1, q, columns], or bool-like [B, columns].
    """
    if mask is None:
        return None
    last = mask[:, -length:] if mask.dim() == 2 else mask[:, 0, -1, -length:]
    if last.is_floating_point():
        return last > torch.finfo(last.dtype).min / 2
    return last.bool()


def newest_columns(mask: Tensor, length: int) -> Tensor:
    """A copy of `visible_columns`, which does not keep the mask alive."""
    visible = visible_columns(mask, length)
    assert visible is not None, "there is a mask"
    return visible.clone()


def rows_by_visibility(
    mask: Tensor | None, length: int, count: int, batch: int
) -> list[tuple[list[int], Tensor | None]]:
    """Batch rows that see the same of the oldest `count` of the last `length` columns.

    Each group: its rows, and the columns they see (None = all). A column that the newest query may
    not see is padding. Rows that see nothing are left out.
    """
    visible = visible_columns(mask, length)
    if visible is None:
        return [(list(range(batch)), None)]
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row, pattern in enumerate(visible[:, :count].expand(batch, -1).tolist()):
        groups.setdefault(tuple(pattern), []).append(row)
    return [
        (rows, None if all(pattern) else torch.tensor(pattern).nonzero().flatten())
        for pattern, rows in groups.items()
        if any(pattern)
    ]


def check_masks(config: PreTrainedConfig) -> None:
    """Refuse an attention implementation whose masks we cannot read.

    It is that of `config`, whose model's attention modules may have had another one before.
    """
    name = attention_implementation(config)
    if not has_readable_masks(name):
        raise ValueError(
            f"`model` uses attn_implementation={name!r}, whose masks PiKVCache cannot read; load it "
            "with 'sdpa', 'eager' or a flash-attention implementation, or set one of them."
        )
