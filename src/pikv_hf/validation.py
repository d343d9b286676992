"""Checks of arguments: names of methods, sizes in bytes and counts."""

import difflib
import re
from typing import Any, TypeVar

Method = TypeVar("Method")
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def resolve(
    argument: str, value: Any, registry: dict[str, type[Method]], base: type[Method]
) -> Method | None:
    """Return the method that `value` (a name, an instance, a class or None) stands for."""
    if value is None or isinstance(value, base):
        return value
    if isinstance(value, type) and issubclass(value, base):
        return value()
    if not isinstance(value, str):
        raise TypeError(
            f"`{argument}` is a {type(value).__name__}; it must be a name, a {base.__name__} or None."
        )
    if value not in registry:
        near = difflib.get_close_matches(value, registry, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"`{argument}` is {value!r}; it must be one of {sorted(registry)}.{hint}")
    return registry[value]()


def parse_bytes(text: str) -> int | None:
    """Parse a size such as '2GiB' or '500 MB' to bytes; None if `text` is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if match is None:
        return None
    number, unit, binary = match.groups()
    nbytes = int(float(number) * (1024 if binary else 1000) ** UNITS[unit.upper()])
    return nbytes or None


def check_count(argument: str, value: Any) -> int:
    """Return `value`, or raise ValueError unless it is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` is {value!r}; it must be a positive whole number.")
    return value
