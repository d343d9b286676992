"""Checks of arguments: names of methods, sizes in bytes and counts."""

import difflib
import re
from collections.abc import Iterable
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
        text = f"`{argument}` is {value!r}; it must be one of {sorted(registry)}."
        raise ValueError(text + hint(value, registry, n=3, cutoff=0.4))
    return registry[value]()


def hint(name: str, names: Iterable[str], n: int = 2, cutoff: float = 0.6) -> str:
    """Return a question whether `name` means one of `names`: at most `n`, as close as `cutoff`."""
    near = difflib.get_close_matches(name, list(names), n, cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def parse_bytes(text: str) -> int | None:
    """Parse a size such as '2GiB' or '500 MB' to bytes; None if `text` is no size, or zero."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if match is None:
        return None
    number, unit, binary = match.groups()
    nbytes = int(float(number) * (1024 if binary else 1000) ** UNITS[unit.upper()])
    return nbytes or None


def check_bytes(argument: str, given: Any, minimum: int = 0) -> int:
    """Return an amount of bytes, a whole number or text such as '2GiB', as a number.

    Raises ValueError if it is neither, or less than `minimum`.
    """
    nbytes = parse_bytes(given) if isinstance(given, str) else given
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < minimum:
        raise ValueError(
            f"`{argument}` is {given!r}; it must be a number of bytes, {minimum} or more, or text such as "
            "'2GiB'."
        )
    return nbytes


def check_count(argument: str, value: Any) -> int:
    """Return `value`, or raise ValueError unless it is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{argument}` is {value!r}; it must be a positive whole number.")
    return value


def check_whole(argument: str, value: Any, minimum: int = 0) -> None:
    """Raise ValueError unless `value` is a whole number of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"`{argument}` is {value!r}; it must be a whole number, {minimum} or more."
        )


def check_seed(argument: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number in [0, 2**63)."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(
            f"`{argument}` is {value!r}; it must be a whole number, 0 or more and below 2**63."
        )


def check_flag(argument: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` is {value!r}; it must be True or False.")


def check_number(argument: str, value: Any, interval: str = "[0, inf)") -> None:
    """Raise ValueError unless `value` is a number in `interval`, such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_above = is_number and (value > low or (value == low and interval[0] == "["))
    if not is_above or not (value < high or (value == high and interval[-1] == "]")):
        accepted = f", {low:g} or more" if interval == "[0, inf)" else f" in {interval}"
        raise ValueError(f"`{argument}` is {value!r}; it must be a number{accepted}.")
