"""The settings of a cache: what a user chose, checked, and what follows from it."""

import functools
from dataclasses import dataclass

from ..compressors import Compressor, Identity
from ..placements import Local, Placement
from ..routers import Router
from ..schedulers import Needs, Scheduler, Traits
from .budget import Budget

# What of a scheduler's `needs` moves keys or queries to other positions.
MOVING = {"rotary", "rerotate"}


@dataclass(frozen=True)
class Settings:
    """The methods and numbers of one cache, which never change.

    Args:
        compressor: how sealed pages are stored.
        scheduler: which tokens stay; None = all.
        router: which pages a query reads; None = all, and tokens carry no labels.
        placement: where pages live.
        page_size: tokens of a page.
        window: newest tokens that stay in the tail.
        has_given_window: whether `window` was given by the user.
        budget: how much may be held; None = what the scheduler says.
        sinks: first tokens of each row that are never evicted.
        interval: generated tokens between two evictions; an eviction frees room for that many.
        holds_prompts: whether a prompt is held whole until its first generated token.
        probe: whether the error of attention over compressed pages is measured.
    """

    compressor: Compressor
    scheduler: Scheduler | None
    router: Router | None
    placement: Placement
    page_size: int
    window: int
    has_given_window: bool = False
    budget: Budget | None = None
    sinks: int = 0
    interval: int | None = None
    holds_prompts: bool = False
    probe: bool = False

    @functools.cached_property
    def needs(self) -> Needs:
        """What the scheduler asks for."""
        return Needs() if self.scheduler is None else self.scheduler.needs

    @functools.cached_property
    def traits(self) -> Traits:
        """How the scheduler chooses."""
        return Traits() if self.scheduler is None else self.scheduler.traits

    @functools.cached_property
    def needs_rotary(self) -> bool:
        """Whether keys or queries are moved to other positions."""
        return not self.needs.inputs.isdisjoint(MOVING)

    @functools.cached_property
    def needs_labels(self) -> bool:
        """Whether tokens carry the experts that the model's gates chose for them."""
        return "experts" in self.needs.inputs or self.router is not None

    @functools.cached_property
    def num_sinks(self) -> int:
        """First tokens of each row that stay whatever the budget is: the user's or the scheduler's."""
        return max(self.sinks, self.needs.sinks)

    @functools.cached_property
    def has_share(self) -> bool:
        """Whether a budget grows with the tokens that are seen, and the tail with it."""
        return self.budget is not None and self.budget.has_share

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
