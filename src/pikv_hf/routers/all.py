from dataclasses import dataclass

from .base import Router


@dataclass(frozen=True)
class All(Router):
    """Lets every query read every page: exact. Tokens are labelled, but the labels are not used."""

    @property
    def needs_labels(self) -> bool:
        return True
