"""The budget of a cache, as a user gives it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..validation import parse_bytes

Amount = int | float | str
ACCEPTED = (
    "a positive number of tokens (int), a share of them (float in (0, 1]), or bytes of the whole "
    "cache such as '2GiB'"
)
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Budget:
    """The amounts that may be held after prefill and during decode; None = no limit.

    An amount is a number of tokens of each row and KV head, a share of the tokens that the row has
    seen, or bytes of the whole cache. If `decode` is None, all generated tokens are held, too.
    """

    prefill: Amount | None
    decode: Amount | None

    def tokens(self, seen: int, generated: int, tokens_in: Callable[[int], int]) -> int | None:
        """Return the tokens per KV head that a row may hold, tail included; None = all.

        `seen`: the tokens of the row, padding not counted; the newest `generated` of them are
        behind its prompt. `tokens_in(nbytes)` is the result for a whole cache of `nbytes` bytes.
        """
        amount = self.in_force(generated)
        if amount is None:
            return None
        adds = generated if self.decode is None else 0
        return _tokens(amount, seen - adds, tokens_in) + adds

    def in_force(self, generated: int) -> Amount | None:
        """Return the amount that applies after `generated` tokens behind the prompt."""
        return self.decode if generated and self.decode is not None else self.prefill

    def bytes_in_force(self, generated: int) -> int | None:
        """Return the bytes of the amount that applies; None if it is not an amount of bytes."""
        amount = self.in_force(generated)
        return parse_bytes(amount) if isinstance(amount, str) else None

    @property
    def has_phases(self) -> bool:
        """True if another amount applies once a token is generated."""
        return self.decode is not None and self.decode != self.prefill

    @property
    def is_in_bytes(self) -> bool:
        return isinstance(self.prefill, str) or isinstance(self.decode, str)

    @property
    def has_share(self) -> bool:
        return isinstance(self.prefill, float) or isinstance(self.decode, float)

    @property
    def min_count(self) -> int | None:
        """Smallest amount that is a number of tokens; None if there is none."""
        counts = [x for x in (self.prefill, self.decode) if isinstance(x, int)]
        return min(counts, default=None)


def make_budget(given: Any) -> Budget:
    """Make a budget from an amount, or from a mapping of `prefill` and `decode` to amounts.

    Raises:
        ValueError: `given` is neither.
    """
    if not isinstance(given, Mapping):
        _check("budget", given)
        return Budget(given, given)
    if not given or not set(given) <= set(PHASES):
        raise ValueError(
            f"`budget` is {given!r}; its keys must be 'prefill', 'decode', or both of them."
        )
    for phase, amount in given.items():
        _check(f"budget[{phase!r}]", amount)
    return Budget(given.get("prefill"), given.get("decode"))


def _check(name: str, amount: Any) -> None:
    is_share = isinstance(amount, float) and 0 < amount <= 1
    is_count = isinstance(amount, int) and not isinstance(amount, bool) and amount > 0
    is_bytes = isinstance(amount, str) and parse_bytes(amount) is not None
    if not (is_share or is_count or is_bytes):
        raise ValueError(f"`{name}` is {amount!r}; it must be {ACCEPTED}.")


def _tokens(amount: Amount, seen: int, tokens_in: Callable[[int], int]) -> int:
    if isinstance(amount, str):
        nbytes = parse_bytes(amount)
        assert nbytes is not None, "refused when the cache was made"
        return tokens_in(nbytes)
    return amount if isinstance(amount, int) else int(amount * seen)
