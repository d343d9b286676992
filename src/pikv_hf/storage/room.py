"""The amount of memory to make for pages to come."""

from dataclasses import dataclass

# New memory is for 1/18 of the pages held; on disk, where each piece is a mapped file, for 1/2.
GROWTH, ROOMY_GROWTH = 18, 2
MIN_GROWTH = 4
# A new store takes in an older one of at most this many times its pages. If pages are sealed
# one after another, there are at most three stores, and a page is copied three to four times.
MERGED = 2
# Pages copied per spare page added; spare pages let eviction find old and new tokens in one piece.
SPARE = 256


@dataclass(frozen=True)
class Room:
    """Room for tokens to come: at most `nbytes`, and for `tokens` of each KV head, if known."""

    nbytes: int
    tokens: int | None = None

    def pages(self, written: int, extra: int, total: int, page_bytes: int) -> int:
        """Return for how many pages to make memory when `written` pages are to be written.

        If the tokens to come are known, it is for `extra` more pages. Otherwise it is for `total`
        pages in all, or `extra` more if that is larger, as far as `nbytes` allow.
        """
        if self.tokens is not None:
            return written + extra
        more = max(total - written, extra)
        return written + min(more, self.nbytes // page_bytes)


NO_ROOM = Room(0)


def grown_pages(held: int, *, is_roomy: bool) -> int:
    """Return for how many pages of a KV head to make memory when it holds `held` pages."""
    if is_roomy:
        return max(held // ROOMY_GROWTH, MIN_GROWTH)
    return max(held // GROWTH, MIN_GROWTH)
