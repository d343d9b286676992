"""What the layers of one cache have in common."""

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .budget import Budget
from .compressors import Compressor, Identity
from .memory import trim_heap
from .model.rotary import Rotary
from .padding import Padding
from .pages import PageTable
from .placement import Local, Placement
from .routers import Router
from .schedulers import Scheduler
from .scratch import Scratch
from .tail import Tail
from .token_log import MOST

# What of a scheduler's `needs` moves keys or queries to other positions.
MOVING = {"rotary", "rerotate"}
# Bytes of keys and values that are sealed until the heap is trimmed: rarely enough to cost little.
TRIMMED = 2**26


@dataclass
class Change:
    """What is being done to a cache of `seen` tokens: a forward pass of `length` more, or sealing (0).

    While it is half done, some layers hold what others do not.
    """

    seen: int
    length: int = 0
    has_written: bool = False
    has_sealed: bool = False

    @property
    def is_half_done(self) -> bool:
        return self.has_written or self.has_sealed


@dataclass
class Shared:
    """What the layers of one cache have in common: its methods, and what one forward computed."""

    compressor: Compressor
    scheduler: Scheduler | None
    router: Router | None
    placement: Placement
    page_size: int
    window: int
    has_given_window: bool = False
    budget: Budget | None = None
    sinks: int = 0
    # Tokens that are generated from one eviction to the next; each drops so many that they fit.
    interval: int | None = None
    # Nothing is sealed: for the time being, or in each prompt until its first generated token.
    holding: bool = False
    holds_prompts: bool = False
    # Within a block of `holding()`, all that is read is one text.
    in_block: bool = False
    # Tokens of the text, cached ones included, that a running `generate` was given; None = unknown.
    prompt_length: int | None = None
    probe: bool = False
    attached: bool = False
    # The attention modules of the paged layers, while attached.
    modules: dict[int, Any] = field(default_factory=dict)
    # How their keys turn with their position, where that is asked for.
    rotaries: dict[int, Rotary] = field(default_factory=dict)
    # A layer outside of our hands reads the same mask, which then spans the whole sequence.
    full_mask: bool = False
    # A user's own mask of each query, who may hide a token from some and not from others.
    has_own_mask: bool = False
    padding: Padding = field(default_factory=Padding)
    memo: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)
    # Keys and values on the CPU that were sealed since the heap was trimmed.
    sealed_bytes: int = 0
    # The pages of all paged layers, in order.
    tables: list[PageTable] = field(default_factory=list)
    # What else the cache holds: layers that are not paged, lists of a model's own cache class, and
    # the tokens of layers that turned out not to be ours to read.
    others: list[Any] = field(default_factory=list)
    unpaged: dict[int, Tail] = field(default_factory=dict)
    # What has begun and not ended: it runs, or it has failed.
    change: Change | None = None
    _notes: dict[tuple[int, ...], dict[Any, Any]] = field(default_factory=dict)

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

    @property
    def needs_rotary(self) -> bool:
        """Whether keys or queries are moved to other positions."""
        return self.scheduler is not None and not self.scheduler.needs.isdisjoint(MOVING)

    @functools.cached_property
    def needs_labels(self) -> bool:
        """Whether tokens carry the experts that the model's gates chose for them."""
        wanted = self.scheduler is not None and "experts" in self.scheduler.needs
        return wanted or self.router is not None

    @functools.cached_property
    def least(self) -> int:
        """The first tokens of each row that stay whatever the budget is: sinks."""
        return max(self.sinks, 0 if self.scheduler is None else self.scheduler.least)

    @functools.cached_property
    def has_share(self) -> bool:
        """Whether a budget grows with the tokens that are seen, and the open ones with it."""
        return self.budget is not None and self.budget.has_share

    @property
    def most_ids(self) -> int | None:
        """About how many of the newest token ids are kept; None = all."""
        repeats = self.scheduler is None or self.scheduler.repetition is not None
        return None if repeats else MOST

    @property
    def methods(self) -> list[str]:
        """The arguments by which something happens to pages."""
        changes = {
            "scheduler": self.scheduler,
            "budget": self.budget,
            "compressor": None if self.compressor == Identity() else self.compressor,
            "router": self.router,
            "placement": None if self.placement == Local() else self.placement,
        }
        return [name for name, value in changes.items() if value is not None]

    @property
    def saves_memory(self) -> bool:
        """Whether sealing makes tokens smaller or fewer."""
        return self.scheduler is not None or self.compressor != Identity()

    def read_ahead(self, number: int) -> None:
        """The pages of paged layer `number` (or of the first one) are the next to be read."""
        if self.placement.reads_ahead:
            self.tables[number % len(self.tables)].read_ahead()

    def over_queries(self, mask: Tensor | None) -> Tensor | None:
        """`mask` as the model made it, or what any query sees, of a user's own [B, H, q, columns].

        The newest query sees all but padding in the masks that models make.
        """
        if mask is None or not self.has_own_mask or mask.dim() == 2:
            return mask
        return self.remember("own", (mask,), lambda: mask.amax((1, 2), keepdim=True))

    @contextlib.contextmanager
    def changing(self, change: Change) -> Generator[None, None, None]:
        """Within the block `change` goes on; it stays if the block fails."""
        self.change = change
        yield
        self.change = None

    def note_written(self) -> None:
        """A layer is being written to."""
        if self.change is not None:
            self.change.has_written = True

    def note_sealed(self) -> None:
        """Pages, or records of tokens, are changing: this cannot be taken back."""
        if self.change is not None:
            self.change.has_sealed = True

    def is_prompt(self, seen: int, length: int) -> bool:
        """Whether `length` tokens behind `seen` others are of a prompt, and not generated.

        Outside of `generate` and of `holding()` one token alone is taken for a generated one.
        """
        if self.in_block or self.prompt_length is None:
            return self.in_block or length > 1
        return seen < self.prompt_length

    def end_forward(self) -> None:
        """Forget what served one forward pass only."""
        self.memo.clear()
        self.forget_notes()
        self.scratch = Scratch()  # which would count as held
        if self.sealed_bytes >= TRIMMED:
            self.sealed_bytes = 0
            trim_heap()

    def forget_notes(self) -> None:
        """The next layer that takes notes is the first one."""
        self._notes.clear()

    def notes(self, rows: list[int]) -> dict[Any, Any]:
        """What earlier layers of this forward pass left for later ones, about these batch rows."""
        return self._notes.setdefault(tuple(rows), {})

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which is copied or saved by itself, and what runs around this cache."""
        outside = {"attached": False, "modules": {}, "in_block": False, "prompt_length": None}
        return vars(self) | outside


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
