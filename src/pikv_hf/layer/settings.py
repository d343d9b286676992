"""The settings of a cache, checked, and the properties that follow from them."""

import functools
from dataclasses import dataclass

from ..compressors import Compressor, Identity
from ..placements import Local, Placement
from ..routers import PageRouter, Router
from ..schedulers import Needs, Scheduler, Traits
from .budget import Budget

# Inputs of a scheduler by which keys or queries are moved to other positions.
MOVING = {"rotary", "rerotate"}


@dataclass(frozen=True)
class Settings:
    """The methods and numbers of one cache, which never change.

    Args:
        compressor: encoding of sealed pages.
        scheduler: choice of the tokens to keep; None = all.
        router: choice of the pages that a query reads; None = all.
        placement: choice of the memory of pages.
        page_size: tokens of a page.
        window: newest tokens that are always in the tail.
        has_given_window: True if the user gave `window`.
        budget: limit of the tokens or bytes held; None = the scheduler's own limit.
        sinks: first tokens of each row that are never evicted.
        interval: generated tokens between two evictions; each eviction frees room for `interval`.
        holds_prompts: True if a prompt is held whole until its first generated token.
        probe: True if the error of attention over compressed pages is measured.
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
        """Needs of the scheduler."""
        return Needs() if self.scheduler is None else self.scheduler.needs

    @functools.cached_property
    def traits(self) -> Traits:
        """Properties of the scheduler's choice."""
        return Traits() if self.scheduler is None else self.scheduler.traits

    @functools.cached_property
    def needs_rotary(self) -> bool:
        """True if keys or queries are moved to other positions."""
        return not self.needs.inputs.isdisjoint(MOVING)

    @functools.cached_property
    def needs_labels(self) -> bool:
        """True if tokens carry the experts that the model's gates chose for them."""
        is_asked = self.router is not None and self.router.needs_labels
        return is_asked or "experts" in self.needs.inputs or self.placement.needs_labels

    @functools.cached_property
    def labels_by_earlier_gate(self) -> bool:
        """True if a layer labels its tokens with the choice of the nearest gate before the layer.

        Experts of different gates cannot be compared: tokens must have the labels by which a router
        foretells the experts of a query.
        """
        return self._source == "previous_layer"

    @functools.cached_property
    def has_early_gates(self) -> bool:
        """True if gates are applied before attention, to foretell the experts of queries."""
        return self._source == "early_gate"

    @property
    def _source(self) -> str | None:
        """What foretells the experts of queries; None = the router does not compare experts."""
        router = self.router
        is_asked = isinstance(router, PageRouter) and router.needs_labels
        return router.source if is_asked else None

    @functools.cached_property
    def num_sinks(self) -> int:
        """Number of first tokens of each row that are always kept, by the user or the scheduler."""
        return max(self.sinks, self.needs.sinks)

    @functools.cached_property
    def has_share(self) -> bool:
        """True if the budget is a share of the tokens seen; the tail then grows with them."""
        return self.budget is not None and self.budget.has_share

    @property
    def methods(self) -> list[str]:
        """Names of the given arguments that have an effect on paged layers only."""
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
        """True if sealing makes tokens smaller or fewer."""
        return self.scheduler is not None or self.compressor != Identity()
