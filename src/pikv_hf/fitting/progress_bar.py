"""The progress bar of calibrations and profiles."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 10.0


def bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a tqdm bar on standard error, which a file or pipe gets every 10 seconds only."""
    if not sys.stderr.isatty():
        options |= {"delay": SECONDS, "mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1}
    return tqdm(items, **options)
