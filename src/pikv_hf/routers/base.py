"""The base class of routers, which select the pages that a query reads."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Router(ABC):
    """Decides which pages a query reads. A frozen dataclass: its configuration, no run state.

    A router that selects pages is a `PageRouter`.
    """

    @property
    @abstractmethod
    def needs_labels(self) -> bool:
        """True if pages carry the experts that the model's gates chose for their tokens."""

    def remark(self, *, has_gate: bool, has_far_pages: bool) -> str | None:
        """Return what a report says of a layer where the router cannot do all that it is for."""
        return None
