"""Versions that pikv_hf works with. Importing this file raises ImportError for older versions.

The package imports it first. It parses on the oldest Pythons and imports only the standard library.
"""

import re
import sys
from importlib.metadata import version

VERSION = "0.1.0"  # the version of pikv_hf

# Oldest and newest minor version of transformers that the whole test suite has passed on;
# pyproject.toml allows no newer one.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 17), (5, 24)
OLDEST_TORCH = (2, 11)
OLDEST_PYTHON = (3, 10)


def minor(text):
    # type: (str) -> tuple[int, ...]
    """Return (5, 24) for `"5.24.0.dev0"`."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def dotted(numbers):
    # type: (tuple[int, ...]) -> str
    """Return `"5.24"` for (5, 24)."""
    return ".".join(map(str, numbers))


TESTED = "tested: {} to {}".format(dotted(OLDEST_TRANSFORMERS), dotted(NEWEST_TRANSFORMERS))  # noqa: UP032

for name, found, oldest in (
    ("Python", tuple(sys.version_info[:2]), OLDEST_PYTHON),
    ("torch", minor(version("torch")), OLDEST_TORCH),
    ("transformers", minor(version("transformers")), OLDEST_TRANSFORMERS),
):
    if found < oldest:
        raise ImportError(
            "pikv_hf needs {0} {1} or newer, but {0} {2} is installed.".format(  # noqa: UP032
                name, dotted(oldest), dotted(found)
            )
        )
