"""What the layers of one cache have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compressors import Compressor
from .placement import Placement
from .routers import Router
from .schedulers import Scheduler


@dataclass
class Shared:
    """What the layers of one cache have in common: its methods, and what one forward computed."""

    compressor: Compressor
    scheduler: Scheduler | None
    router: Router | None
    placement: Placement
    page_size: int
    window: int
    budget: int | float | None = None
    attached: bool = False
    # A layer outside of our hands reads the same mask, which then spans the whole sequence.
    full_mask: bool = False
    recording: bool = False
    memo: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def remember(self, name: str, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """`compute()`, once per `key` (compared by identity of its parts) for all layers."""
        held = self.memo.get(name)
        if held is not None and all(
            a is b or (isinstance(a, int | torch.device) and a == b)
            for a, b in zip(held[0], key, strict=True)
        ):
            return held[1]
        value = compute()
        self.memo[name] = (key, value)
        return value

    def budget_of(self, seen: int) -> int:
        """Tokens per row and KV head to hold after `seen`."""
        assert self.scheduler is not None
        if self.budget is None:
            return self.scheduler.budget(seen)
        return self.budget if isinstance(self.budget, int) else int(self.budget * seen)


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
