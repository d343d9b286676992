"""How far a long work has come."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 10.0


def bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of tqdm on standard error; where that is no terminal, a line every ten seconds."""
    if not sys.stderr.isatty():
        options |= {"delay": SECONDS, "mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1}
    return tqdm(items, **options)
