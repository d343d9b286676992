"""Memory for pages beyond those that are written now: few pieces, and little that is never used."""

from dataclasses import dataclass

# Room is made for 1/16 of the pages held; on disk, where each piece is a file that is mapped, for 1/2.
GROWTH, ROOMY_GROWTH = 16, 2
MIN_GROWTH, MAX_GROWTH = 4, 32
# Where so many pages are copied, one more has room: eviction then finds old and new tokens in one piece.
SPARE = 256


@dataclass(frozen=True)
class Room:
    """Room for tokens to come: at most `nbytes`; for `tokens` of each KV head, if that is known."""

    nbytes: int
    tokens: int | None = None

    def pages(self, written: int, least: int, grown: int, page_bytes: int) -> int:
        """For how many pages memory is made when `written` ones of so many bytes are written.

        For `least` more; if the tokens to come are not known, for `grown` ones in all, as far as
        `nbytes` allow.
        """
        if self.tokens is not None:
            return written + least
        more = max(grown - written, least)
        return written + min(more, self.nbytes // page_bytes)


NO_ROOM = Room(0)


def grown_pages(held: int, *, is_roomy: bool) -> int:
    """Pages of a KV head to make room for where it holds `held` of them."""
    if is_roomy:
        return max(held // ROOMY_GROWTH, MIN_GROWTH)
    return min(max(held // GROWTH, MIN_GROWTH), MAX_GROWTH)
