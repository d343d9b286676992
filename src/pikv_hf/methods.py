"""From what a user passes for a method to the method."""

import difflib
from typing import Any, TypeVar

Method = TypeVar("Method")


def resolve(
    argument: str, value: Any, registry: dict[str, type[Method]], base: type[Method]
) -> Method | None:
    """The method that `value` (a name, an instance, a class or None) stands for."""
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
