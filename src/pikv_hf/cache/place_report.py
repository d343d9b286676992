"""What each place holds of the pages of a cache that deals them to devices or ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..layer.page_experts import pages_per_expert
from ..layer.state import LayerState


@dataclass(frozen=True)
class PlaceReport:
    """The numbers of one place, summed over layers, rows and KV heads.

    `device`: a device of this process, or "rank 3". `bytes_held`: bytes of encoded pages, with the room
    for more. `bytes_sent`: bytes that attention has moved to and from a device, or that a rank has
    sent. `pages_per_expert`: full pages by the expert with the largest share in them; None without
    labels.
    """

    device: str
    pages: int
    bytes_held: int
    bytes_sent: int
    pages_per_expert: list[int] | None

    @classmethod
    def of(cls, states: Iterable[LayerState]) -> "list[PlaceReport]":
        """Return the places of all layers; [] if pages are not dealt."""
        found: dict[str, list[PlaceReport]] = {}
        for state in states:
            for place in range(state.pages.places.count):
                name = state.pages.places.name(place)
                if name is not None:
                    found.setdefault(name, []).append(_of_layer(state, place, name))
        return [_sum(found[name]) for name in sorted(found)]


def imbalance(places: list[PlaceReport]) -> float:
    """Return the pages of the fullest place over the mean of all; 1.0 without pages."""
    pages = [place.pages for place in places]
    return max(pages) * len(pages) / sum(pages) if any(pages) else 1.0


def _of_layer(state: LayerState, place: int, name: str) -> PlaceReport:
    stores = state.pages.of_place(place)
    sent = state.sent["ranks" if state.pages.places.exchange else name]
    pages = sum(store.page_count for store in stores)
    nbytes = sum(store.nbytes for store in stores)
    return PlaceReport(name, pages, nbytes, sent, pages_per_expert(stores))


def _sum(layers: list[PlaceReport]) -> PlaceReport:
    counts = [layer.pages_per_expert for layer in layers if layer.pages_per_expert is not None]
    width = max(map(len, counts), default=0)
    padded = [count + [0] * (width - len(count)) for count in counts]
    return PlaceReport(
        device=layers[0].device,
        pages=sum(layer.pages for layer in layers),
        bytes_held=sum(layer.bytes_held for layer in layers),
        bytes_sent=sum(layer.bytes_sent for layer in layers),
        pages_per_expert=[sum(column) for column in zip(*padded, strict=True)] if counts else None,
    )
